"""What a unit needs before it can work, imported by the zygote once instead of by every worker.

At its first conversion pyarrow imports pandas where it is installed: a quarter of a second.
"""

import pyarrow as pa
import pyarrow.parquet

from fanfold.job import assemble, compute, prepare

__all__ = ["assemble", "compute", "prepare", "pyarrow"]

pa.array([0]).to_numpy()
