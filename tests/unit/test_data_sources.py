"""What holds for every source: the same rows give the same windows and texts, resumed, limited or sent."""

from __future__ import annotations

import gzip
import io
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.data import parquet_reader
from fanfold.data.opening import open_source

TEXTS = [f"text {i} " + 'é\n",' * (i % 4) for i in range(23)]
SPLIT = (0, 9, 10, 23)
FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "stdin", "parquet", "csv"]


@pytest.fixture(autouse=True)
def _no_reader_stays_open():
    yield
    while parquet_reader._READERS:
        parquet_reader._READERS.popitem()[1].close()


@pytest.fixture
def make(tmp_path):
    """A source of TEXTS in a format, in three files (stdin: in one stream)."""

    def write(name, texts):
        path = tmp_path / name
        records = [json.dumps({"text": text, "n": "x"}) for text in texts]
        data = ("\n".join(records) + "\n" * (len(texts) % 2)).encode()
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": texts, "n": ["x"] * len(texts)}), path, row_group_size=4)
        elif name.endswith("csv"):
            cells = ['"' + text.replace('"', '""') + '",x\n' for text in texts]
            path.write_text("text,n\n" + "".join(cells))
        elif name.endswith("gz"):
            path.write_bytes(gzip.compress(data))
        elif name.endswith("zst"):
            path.write_bytes(pa.Codec("zstd").compress(data).to_pybytes())
        else:
            path.write_bytes(data)
        return str(path)

    def build(form, block_bytes=64, **options):
        options = {"spool": tmp_path / "spool", "block_bytes": block_bytes, **options}
        if form == "stdin":
            data = "".join(json.dumps({"text": text, "n": "x"}) + "\n\n" for text in TEXTS).encode()
            return open_source(["-"], stdin=io.BytesIO(data), **options)
        inputs = [write(f"{i}.{form}", TEXTS[SPLIT[i] : SPLIT[i + 1]]) for i in range(3)]
        return open_source(inputs, **options)

    return build


def texts_of(source, windows):
    return [text for window in windows for chunk in source.chunks(window) for text in chunk.texts]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_the_same_rows_give_the_same_windows_and_texts_in_every_format(make, form, block_bytes):
    source = make(form, block_bytes)
    windows = list(source.windows(12))
    assert [(w.index, w.first_row, w.num_rows) for w in windows] == [(0, 0, 12), (1, 12, 11)]
    assert texts_of(source, windows) == TEXTS
    assert source.kept_schema == pa.schema([("text", pa.string()), ("n", pa.string())])
    if form != "stdin":
        assert [span.file for span in windows[0].spans] == [0, 1, 2]  # one window over three files
        assert [span.rows for span in windows[0].spans] == [9, 1, 2]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("limit", [None, 10, 0])
def test_resume_behind_any_window_goes_on_as_one_pass(make, form, limit):
    windows = list(make(form, limit=limit).windows(4))
    assert sum(w.num_rows for w in windows) == (len(TEXTS) if limit is None else limit)
    for i, window in enumerate(windows):
        assert list(make(form, limit=limit).windows(4, after=window)) == windows[i + 1 :]


@pytest.mark.parametrize("form", FORMATS)
def test_a_source_sent_away_reads_the_same(make, form):
    source = make(form)
    windows = list(source.windows(5))
    sent, windows_sent = pickle.loads(pickle.dumps((source, windows)))
    assert windows_sent == windows
    assert texts_of(sent, windows_sent) == TEXTS
    assert sent.files == source.files
    source.release(0)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "csv"])
def test_total_bytes_is_the_sum_of_the_files(make, form, tmp_path):
    assert make(form).total_bytes == sum(path.stat().st_size for path in tmp_path.glob(f"*.{form}"))


def test_resume_does_not_read_what_lies_before(make, tmp_path):
    source = make("jsonl", block_bytes=1 << 20)
    windows = list(source.windows(4))
    (tmp_path / "0.jsonl").unlink()
    assert list(source.windows(4, after=windows[3])) == windows[4:]


def test_urls_are_read_like_files(make, tmp_path):
    make("jsonl")
    source = open_source([f"file://{tmp_path}/*.jsonl"])
    assert texts_of(source, source.windows(100)) == TEXTS


def test_a_source_of_rows_without_columns_counts_its_rows(make):
    for form in FORMATS:
        source = make(form, keep="none")
        (window,) = source.windows(100)
        assert sum(chunk.kept.num_rows for chunk in source.chunks(window)) == len(TEXTS)
