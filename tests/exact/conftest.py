"""Checkpoints built once per session, and files of documents."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.util import find_spec

import checkpoints
import pytest


@pytest.fixture(scope="session")
def reference_library():
    """sentence-transformers, imported when the first test needs it and not while tests are collected."""
    if find_spec("sentence_transformers") is None:
        pytest.skip("the reference is not installed: pip install sentence-transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what third parties say while they are imported is not ours
        import sentence_transformers
    return sentence_transformers


@pytest.fixture(scope="session")
def quiet():
    """transformers draws no bars and warns of nothing."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def ranks():
    """ranks(split) -> a group of ranks of that layout, which lives as long as the tests of the file."""
    from fanfold.tasks.parallel_model import start

    started = {}

    def of(split):
        if split not in started:
            started[split] = start(split, timeout_s=60.0)
        return started[split]

    yield of
    for group in started.values():
        group.close()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """built(family, ...) -> the folder of a plain checkpoint that nobody may change."""
    made = {}
    root = tmp_path_factory.mktemp("checkpoints")

    def build(family, **settings):
        key = (family, *sorted(settings.items()))
        if key not in made:
            made[key] = checkpoints.write_model(root / f"{len(made)}-{family}", family, **settings)
        return made[key]

    return build


@pytest.fixture
def checkpoint(built, tmp_path):
    """checkpoint(family, head={...}) -> a copy of the checkpoint that the test may change."""

    def copy(family, *, head=None, name="model", **settings):
        folder = tmp_path / name
        shutil.copytree(built(family, **settings), folder)
        if head is not None:
            checkpoints.write_head(folder, **head)
        return folder

    return copy


@pytest.fixture(scope="session")
def documents():
    """150 records: an id, a text, a unicode column, numbers; some with a null."""
    texts = [text for text in checkpoints.docstrings() if len(text) > 10]
    return [
        {
            "id": f"doc-{i:04d}",
            "text": texts[(53 * i) % len(texts)][: 1200 if i % 25 == 0 else 160],
            "näme": f"Ünïcode 日本 {i} 😀" if i % 7 else None,
            "count": i * 3,
            "score": i / 8,
        }
        for i in range(150)
    ]


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """written(name, records) -> {"jsonl": path, "gz": path, "parquet": path}, the same rows in each."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name, records):
        root = tmp_path_factory.mktemp(name)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        (root / "docs.jsonl").write_bytes(lines)
        (root / "docs.jsonl.gz").write_bytes(gzip.compress(lines, compresslevel=1))
        pq.write_table(pa.Table.from_pylist(records), root / "docs.parquet", row_group_size=1000)
        return {"jsonl": root / "docs.jsonl", "gz": root / "docs.jsonl.gz", "parquet": root / "docs.parquet"}

    return write
