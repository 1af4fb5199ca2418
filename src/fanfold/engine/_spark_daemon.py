"""Spark's Python daemon as a zygote: `python -m fanfold.engine._spark_daemon pyspark.worker`, started by Spark.

One runs per executor. It imports once what the job names, then hands over to pyspark's own daemon, which forks
a Python worker for each slot; units are forked from those. Everything imported here is shared by all of them.
"""

from __future__ import annotations

import gc
import os
import sys

from pyspark.daemon import manager

from fanfold.engine._worker import import_all

IMPORTS = "FANFOLD_IMPORTS"  # names with commas


def main() -> None:
    # Spark reads this process's stdout as a protocol: whatever an import prints goes to stderr.
    stdout_fd = os.dup(1)
    os.dup2(2, 1)
    import_all(tuple(filter(None, os.environ.get(IMPORTS, "").split(","))))
    sys.stdout.flush()
    os.dup2(stdout_fd, 1)
    os.close(stdout_fd)
    gc.collect()
    gc.freeze()
    manager()


if __name__ == "__main__":
    main()
