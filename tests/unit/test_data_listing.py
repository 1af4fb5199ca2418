"""Inputs become files in a stated order, and every input that cannot be read is refused with what to do."""

from __future__ import annotations

import os

import pytest

from fanfold.data.listing import list_inputs
from fanfold.errors import InputError


@pytest.fixture
def folder(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"{}\n")
        return tmp_path

    return make


def names(inputs, root):
    return [os.path.relpath(file.path, root) for file in list_inputs([str(i) for i in inputs]).files]


def refusal(*inputs):
    with pytest.raises(InputError) as caught:
        list_inputs([str(i) for i in inputs])
    error = caught.value
    assert all((error.asked, error.found, error.allowed, error.do))
    return str(error)


def test_a_folder_is_read_recursively_in_byte_order_without_hidden_files(folder):
    root = folder("b.jsonl", "a/z.ndjson.gz", "B.jsonl", "_SUCCESS", ".x.jsonl", "_t/a.jsonl", "é.jsonl.zst", "note.md")
    assert names([root], root) == ["B.jsonl", "a/z.ndjson.gz", "b.jsonl", "é.jsonl.zst"]


def test_a_run_folder_gives_its_parts_only(folder):
    root = folder(
        "run.json",
        "data/part-000000001.jsonl",
        "data/part-000000000.jsonl",
        "quarantine.jsonl",
        "data/x.jsonl",
    )
    assert names([root], root) == ["data/part-000000000.jsonl", "data/part-000000001.jsonl"]


def test_inputs_keep_their_order_and_a_file_may_stand_twice(folder):
    root = folder("a.jsonl", "b.jsonl")
    assert names([root / "b.jsonl", root / "*.jsonl"], root) == ["b.jsonl", "a.jsonl", "b.jsonl"]


def test_globs_are_expanded_and_a_file_with_glob_letters_is_itself(folder):
    root = folder("a[1].csv", "a1.csv", "d/e/f.csv", "d/.g.csv")
    assert names([root / "a[1].csv"], root) == ["a[1].csv"]
    assert names([root / "a?.csv"], root) == ["a1.csv"]
    assert names([root / "**/*.csv"], root) == ["a1.csv", "a[1].csv", "d/e/f.csv"]


def test_relative_paths_become_absolute_with_size_and_time(folder, monkeypatch):
    monkeypatch.chdir(folder("a.txt"))
    (file,) = list_inputs(["a.txt"]).files
    assert os.path.isabs(file.path)
    assert (file.size_bytes, file.mtime_ns) == (3, os.stat("a.txt").st_mtime_ns)


def test_urls_are_listed_by_fsspec(folder):
    root = folder("a.jsonl", "b.jsonl", "_c.jsonl")
    url = f"file://{root}"
    assert [f.path for f in list_inputs([f"{url}/b.jsonl"]).files] == [f"{url}/b.jsonl"]
    assert [f.path for f in list_inputs([url]).files] == [f"{url}/a.jsonl", f"{url}/b.jsonl"]
    assert [f.size_bytes for f in list_inputs([f"{url}/a*.jsonl"]).files] == [3]
    assert "no such file" in refusal(f"{url}/c.jsonl")
    assert "nosuch" in refusal("nosuch://a.jsonl")


def test_stdin_stands_alone():
    assert list_inputs(["-"]).files[0].size_bytes is None
    assert "'-' alone" in refusal("-", "a.jsonl")


@pytest.mark.parametrize(
    ("names", "given", "told"),
    [
        ((), "a.jsonl", "no such file"),
        (("a.csv",), "*.jsonl", "no file matches"),
        (("a.md",), "", "no file of a known format"),
        (("a.md",), "a.md", "suffix names no known format"),
        (("a.parquet.gz",), "a.parquet.gz", "suffix names no known format"),
        (("a.csv", "b.txt.gz"), "", "is csv"),
        (("run.json", "data/x.jsonl"), "", "run folder without a finished part"),
    ],
)
def test_what_cannot_be_read_is_refused(folder, names, given, told):
    assert told in refusal(folder(*names) / given)


def test_no_input_a_pipe_and_a_forbidden_file_are_refused(folder, monkeypatch):
    assert "no input was given" in refusal()
    root = folder("a.jsonl")
    os.mkfifo(root / "p.jsonl")
    assert "not a regular file" in refusal(root / "p.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "permission denied" in refusal(root / "a.jsonl")


def test_messages_are_inert_in_a_terminal(tmp_path):
    assert "\x1b" not in refusal(tmp_path / "\x1b[31m.jsonl")
