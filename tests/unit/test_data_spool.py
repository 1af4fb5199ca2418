"""Streams and compressed files are spooled window by window, and resume gives the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle

import pyarrow as pa
import pytest

from fanfold.data.opening import open_source
from fanfold.errors import InputError, InternalError


def packed(suffix, data):
    if suffix == "gz":
        return gzip.compress(data)
    return pa.Codec("zstd").compress(data).to_pybytes()


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(source, windows):
    return [text for window in windows for chunk in source.chunks(window) for text in chunk.texts]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_files_of_several_members_are_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed(suffix, lines("a", "b")) + packed(suffix, lines("c")) + packed(suffix, lines("d")))
    source = open_source([str(path)], spool=tmp_path / "spool")
    windows = list(source.windows(3))
    assert texts_of(source, windows) == list("abcd")
    for window in windows:
        data = (tmp_path / "spool" / f"w-{window.index:09d}").read_bytes()
        assert window.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[: len(b) // 2], lambda b: b"??" + b[2:]])
def test_a_truncated_or_corrupt_file_is_refused_by_name(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(damage(packed(suffix, "".join(f"{i * i}\n" for i in range(5000)).encode())))
    with pytest.raises(InputError, match=rf"a\.txt\.{suffix}") as caught:
        list(open_source([str(path)], spool=tmp_path / "spool").windows(100))
    assert "cannot be decompressed" in caught.value.found
    assert not list((tmp_path / "spool").glob("*tmp*"))


@pytest.mark.parametrize("block_bytes", [3, 16, 1 << 20])
def test_csv_over_files_is_spooled_without_boms_and_headers(tmp_path, block_bytes):
    paths = [tmp_path / "a.csv.gz", tmp_path / "b.csv", tmp_path / "c.csv.zst"]
    paths[0].write_bytes(packed("gz", b'\xef\xbb\xbftext\r\n"a\n1"\n\nb'))
    paths[1].write_bytes(b"text\nc\n")
    paths[2].write_bytes(packed("zst", b"\ntext\n\nd\n"))
    source = open_source(list(map(str, paths)), spool=tmp_path / "spool", block_bytes=block_bytes)
    (window,) = source.windows(10)
    assert texts_of(source, [window]) == ["a\n1", "b", "c", "d"]
    assert (tmp_path / "spool/w-000000000").read_bytes() == b'"a\n1"\n\nbc\n\nd\n'
    assert [(s.file, s.rows, s.first_line) for s in window.spans] == [(0, 2, 2), (1, 1, 2), (2, 1, 4)]


def test_messages_keep_the_original_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines("a", "b") + b"\n\n{oops}\n"))
    source = open_source([str(path)], spool=tmp_path / "spool")
    last = list(source.windows(2))[1]
    (failure,) = next(source.chunks(last)).failures
    assert f"{path}, line 5: not JSON" in failure.message


@pytest.mark.parametrize("block_bytes", [5, 1 << 20])
def test_resume_behind_any_window_gives_the_same_windows(tmp_path, block_bytes):
    paths = [str(tmp_path / f"{i}.txt.gz") for i in range(3)]
    for i, path in enumerate(paths):
        with gzip.open(path, "wb") as out:
            out.write("\n".join(f"{i}-{j}" * (j % 3) for j in range(8)).encode())
    source = open_source(paths, spool=tmp_path / "one", block_bytes=block_bytes, limit=21)
    windows = list(source.windows(5))
    assert [w.num_rows for w in windows] == [5, 5, 5, 5, 1]
    for i, window in enumerate(windows):
        spool = tmp_path / f"r{i}"
        again = open_source(paths, spool=spool, block_bytes=block_bytes, limit=21)
        assert list(again.windows(5, after=window)) == windows[i + 1 :]
        assert len(list(spool.iterdir())) == len(windows) - i - 1
        assert texts_of(again, windows[i + 1 :]) == texts_of(source, windows[i + 1 :])


def test_an_equal_spool_file_is_left_alone_and_a_damaged_one_replaced(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"a\nb\n"))
    source = open_source([str(path)], spool=tmp_path / "spool")
    first, second = source.windows(1)
    files = [tmp_path / "spool" / f"w-{i:09d}" for i in range(2)]
    before = files[0].stat().st_ino
    files[1].write_bytes(b"X\n")
    with pytest.raises(InputError, match="gone or not what was written"):
        list(source.chunks(second))
    assert list(source.windows(1)) == [first, second]
    assert files[0].stat().st_ino == before
    assert texts_of(source, [first, second]) == ["a", "b"]
    source.release(0)
    source.release(0)
    assert not files[0].exists()
    with pytest.raises(InputError, match="gone"):
        list(source.chunks(first))


def test_stdin_is_read_once_and_left_behind_in_pickling(tmp_path):
    data = lines("a", "b", "c")
    source = open_source(["-"], spool=tmp_path / "spool", stdin=io.BytesIO(data), block_bytes=7)
    assert source.total_bytes is None
    assert source.kept_schema.names == ["text"]
    windows = list(source.windows(2))
    sent = pickle.loads(pickle.dumps(source))
    assert texts_of(sent, windows) == ["a", "b", "c"]
    with pytest.raises(InputError, match="read again"):
        list(source.windows(2))
    with pytest.raises(InternalError, match="sent to another process"):
        list(sent.windows(2))
    again = open_source(["-"], spool=tmp_path / "spool2", stdin=io.BytesIO(data))
    assert list(again.windows(2, after=windows[0])) == windows[1:]


def test_stdin_is_not_read_beyond_the_first_records_at_open(tmp_path):
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size=-1):
            self.given += 1
            return lines("x" * 50) * 200

    stream = Endless()
    source = open_source(["-"], spool=tmp_path / "s", stdin=stream, limit=3, block_bytes=1 << 12)
    assert stream.given == 1
    assert texts_of(source, source.windows(10)) == ["x" * 50] * 3


def test_stdin_names_itself_in_messages(tmp_path):
    source = open_source(["-"], spool=tmp_path / "s", stdin=io.BytesIO(lines("a") + b"{\n"))
    (failure,) = next(source.chunks(next(source.windows(5)))).failures
    assert failure.message.startswith("standard input, line 2: not JSON")


def test_windows_without_a_spool_folder_are_a_bug(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"a\n"))
    with pytest.raises(InternalError, match="no spool folder"):
        next(open_source([str(path)]).windows(1))
