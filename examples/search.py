"""Questions in plain words, answered with the nearest documents of an embedded folder.

python examples/search.py OUT QUESTION...
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds

import fanfold as ff


def main() -> None:
    out, questions = Path(sys.argv[1]), sys.argv[2:]
    table = ds.dataset(str(out / "data"), format="parquet").to_table(columns=["id", "text", "embedding"])
    vectors = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    for question, vector in zip(questions, ff.embed(questions), strict=True):
        scores = vectors @ vector
        print(f"\n{question}")
        for row in np.argsort(-scores)[:3].tolist():
            first_line = table.column("text")[row].as_py().strip().splitlines()[0]
            print(f"  {scores[row]:.2f}  {table.column('id')[row].as_py()}: {first_line[:80]}")


if __name__ == "__main__":
    main()
