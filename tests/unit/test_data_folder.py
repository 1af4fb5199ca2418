"""The run folder: what -o names, what is refused, what starting anew takes away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fanfold.data import durable
from fanfold.data.durable import PosixStore
from fanfold.data.folder import CLAIM, FOLDERS, RUN, SUCCESS, Output, open_run, read_json, write_json
from fanfold.errors import ResumeError

OURS = {"fanfold_version": "0.1.0", "plan": {}, "fingerprint": {"task": {}}, "request": {}}


def snapshot(folder):
    """Every path below with its bytes and time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def opened(out, **options):
    """What open_run says, with the store closed again."""
    store, stored = open_run(Output(out), **{"overwrite": False, "sync": False, **options})
    store.close()
    return stored


def made(out):
    """A run folder with something in every place."""
    store, _ = open_run(Output(out), overwrite=False, sync=False)
    write_json(store, RUN, OURS)
    for name in (SUCCESS, "summary.json", "quarantine.jsonl", "trace.json.gz", "commits.log"):
        store.replace(name, b"{}")
    for folder in FOLDERS:
        store.replace(f"{folder}/x", b"x")
    store.close()
    return store.root


# -- what -o names ----------------------------------------------------------------------------------------


def test_a_name_without_a_known_ending_is_the_run_folder(tmp_path):
    output = Output(tmp_path / "out")
    assert (output.file, output.folder, output.format) == (None, tmp_path / "out", "parquet")
    assert output.shown == tmp_path / "out"


@pytest.mark.parametrize("format_name", ["parquet", "jsonl", "csv"])
def test_a_file_has_its_run_folder_beside_it(tmp_path, format_name):
    file = tmp_path / f"a.b.{format_name}"
    output = Output(file)
    assert (output.file, output.format, output.shown) == (file, format_name, file)
    assert output.folder == tmp_path / f"a.b.{format_name}.run"


def test_a_folder_with_a_files_ending_is_a_folder(tmp_path):
    (tmp_path / "a.parquet").mkdir()
    output = Output(tmp_path / "a.parquet")
    assert (output.file, output.folder, output.format) == (None, tmp_path / "a.parquet", "parquet")


def test_a_relative_name_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Output(Path("a.csv"))
    monkeypatch.chdir("/")
    assert (output.file, output.folder) == (tmp_path / "a.csv", tmp_path / "a.csv.run")


# -- new, and again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["out", "deep/er/out", "a.parquet"])
def test_a_new_run_makes_its_folders_and_holds_no_job(tmp_path, out):
    assert opened(tmp_path / out) is None
    assert {path.name for path in Output(tmp_path / out).folder.iterdir()} == {*FOLDERS, CLAIM}


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    assert opened(tmp_path / "out") is None


def test_the_job_of_an_earlier_run_is_given(tmp_path):
    made(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert opened(tmp_path / "out") == OURS
    after = snapshot(tmp_path / "out")
    assert before.keys() - after.keys() == {"tmp/x"}  # of a run that has died
    assert after.keys() <= before.keys()
    assert [name for name in after if name not in (CLAIM, "tmp") and before[name] != after[name]] == []


def test_a_folder_that_is_held_keeps_its_temporary_files(tmp_path):
    store, _ = open_run(Output(tmp_path / "out"), overwrite=False)
    store.write_temporary("tmp/at-work", b"x")
    with pytest.raises(ResumeError):
        opened(tmp_path / "out")
    assert store.list("tmp") == ["at-work"]
    store.close()


def test_a_run_folder_is_held_by_one_run(tmp_path):
    store, _ = open_run(Output(tmp_path / "out"), overwrite=False)
    with pytest.raises(ResumeError) as refused:
        open_run(Output(tmp_path / "out"), overwrite=True)
    assert f'"pid": {os.getpid()}' in refused.value.found
    store.close()
    assert opened(tmp_path / "out") is None


def test_a_held_folder_is_not_cleared(tmp_path):
    made(tmp_path / "out")
    store, _ = open_run(Output(tmp_path / "out"), overwrite=False)
    with pytest.raises(ResumeError):
        open_run(Output(tmp_path / "out"), overwrite=True)
    assert read_json(store, RUN) == OURS
    store.close()


@pytest.mark.parametrize(
    "leftovers",
    [
        [CLAIM],
        [CLAIM, *(f"{name}/" for name in FOLDERS)],
        ["data/", "tmp/"],
        [CLAIM, *(f"{name}/" for name in FOLDERS), f"{RUN}.0a1b2c3d.tmp"],
    ],
)
def test_what_a_run_killed_before_run_json_leaves_is_taken(tmp_path, leftovers):
    for name in leftovers:
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(b"{")
    assert opened(tmp_path / "out") is None


# -- foreign ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["thesis.tex"], "thesis.tex"),
        ([".git/config"], ".git"),
        (["data/mine.parquet"], "data"),
        (["d", "a", "c", "b"], "a, b, c"),
        ([SUCCESS], SUCCESS),
        (["commits.log"], "commits.log"),
        ([f"{CLAIM}2"], f"{CLAIM}2"),
        (["run.jsonl"], "run.jsonl"),
    ],
)
def test_a_foreign_folder_is_refused_and_nothing_changes(tmp_path, names, shown, overwrite):
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ResumeError) as refused:
        opened(out, overwrite=overwrite)
    assert refused.value.asked == f"output to {out}"
    assert refused.value.found == f"{out} holds something else: {shown}"
    assert refused.value.allowed == "an empty or new folder, or one that a run of Fanfold has made"
    assert refused.value.do == "choose another output with -o; nothing was changed"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_where_the_folder_should_be_is_refused(tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ResumeError) as refused:
        opened(tmp_path / "out", overwrite=overwrite)
    assert refused.value.found.endswith("holds something else: out (a file)")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"name": "of another tool", "id": 7}', "[]", "not json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_json_of_another_tool_does_not_make_a_folder_ours(tmp_path, content, overwrite):
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data" / "mine.csv").write_text("years of work")
    (out / RUN).write_text(content)
    with pytest.raises(ResumeError):
        opened(out, overwrite=overwrite)
    assert (out / "data" / "mine.csv").read_text() == "years of work"
    assert (out / RUN).read_text() == content


def test_a_foreign_output_file_is_refused(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("mine")
    with pytest.raises(ResumeError) as refused:
        opened(file)
    assert refused.value.asked == f"output to {file}"
    assert refused.value.found == "the file exists and no run of Fanfold stands beside it"
    assert refused.value.do == "choose another output with -o, or replace the file with --overwrite"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_overwrite_of_an_output_file_leaves_it_until_the_new_one_is_there(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    assert opened(tmp_path / "a.csv", overwrite=True) is None
    assert (tmp_path / "a.csv").read_text() == "old"


def test_an_output_file_of_ours_is_taken(tmp_path):
    made(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("row,embedding\n")
    assert opened(tmp_path / "a.csv") == OURS


# -- starting anew ----------------------------------------------------------------------------------------


def test_overwrite_takes_away_what_a_run_has_made(tmp_path):
    made(tmp_path / "out")
    assert opened(tmp_path / "out", overwrite=True) is None
    left = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert left == sorted([CLAIM, *FOLDERS])


def test_overwrite_leaves_what_stands_beside(tmp_path):
    out = made(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    (out / "plots").mkdir()
    opened(out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "plots").is_dir()


def test_starting_anew_takes_success_away_first_and_run_json_last(tmp_path, monkeypatch):
    """At any moment of it, a crash leaves either a folder that is not finished, or one that is still ours."""
    out = made(tmp_path / "out")
    removed = []
    real = PosixStore.remove
    monkeypatch.setattr(PosixStore, "remove", lambda store, *names: (removed.extend(names), real(store, *names))[1])
    opened(out, overwrite=True)
    assert removed[0] == SUCCESS
    assert removed[-1] == RUN


def test_the_removal_of_success_is_flushed_before_anything_else_goes(tmp_path, monkeypatch):
    """The disk may keep removals back in any order: a crash must not leave _SUCCESS beside half a folder."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("which file is flushed is read from /proc")
    out = made(tmp_path / "out")
    done, fsync, remove = [], os.fsync, PosixStore.remove

    def noted_fsync(fd):
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        fsync(fd)

    def noted_remove(store, *names):
        done.extend(f"remove {name}" for name in names)
        remove(store, *names)

    monkeypatch.setattr(durable.os, "fsync", noted_fsync)
    monkeypatch.setattr(PosixStore, "remove", noted_remove)
    opened(out, overwrite=True, sync=True)
    at = done.index(f"remove {SUCCESS}")
    assert done[at + 1] == "flush out"


# -- damaged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 100])
def test_a_damaged_run_json_is_refused_and_the_folder_let_go(tmp_path, damage):
    out = made(tmp_path / "out")
    (out / RUN).write_bytes(damage)
    for _ in range(2):  # the claim is let go of after a refusal
        with pytest.raises(ResumeError) as refused:
            opened(out)
        assert refused.value.asked == f"reading {out / RUN}"
        assert refused.value.found.startswith("it is damaged: ")
        assert "--overwrite" in refused.value.do
    assert (out / RUN).read_bytes() == damage
    assert opened(out, overwrite=True) is None  # what the message advises


def test_objects_are_written_for_people_and_read_back(tmp_path):
    store = PosixStore(tmp_path, sync=False)
    value = {"text": "ü", "path": tmp_path, "n": 1}
    write_json(store, "summary.json", value)
    assert read_json(store, "summary.json") == {**value, "path": str(tmp_path)}
    assert '"ü",\n' in (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert read_json(store, "missing.json") is None
