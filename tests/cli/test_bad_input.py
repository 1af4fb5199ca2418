"""Bad input on the command line: what it says, with which exit code, how soon, and what it leaves alone."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SOON_S = 3.0  # of a processor: nothing was loaded


@pytest.fixture
def docs(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"id": 1, "text": "a text"}\n{"id": 2, "text": "another"}\n')
    return path


def refused(done, code, *words, soon=True):
    """The command ended with this code and a message of four parts that holds the words."""
    assert done.code == code, done.err
    assert done.out == ""
    assert set(done.message) == {"asked", "found", "allowed", "do"}, done.err
    assert all(done.message.values()), done.err
    assert ": " in done.message["asked"]
    assert "Traceback" not in done.err
    shown = "\n".join(done.message.values())
    for word in words:
        assert word in shown, done.err
    if soon:
        assert done.processor_s < SOON_S, f"{done.processor_s:.2f} s"


def tree(folder):
    """Everything below the folder: name -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--frobnicate",), "--frobnicate"),
        (("--limit", "many"), "many"),
        (("--limit",), "--limit"),
    ],
)
def test_a_flag_that_cannot_be_read_is_a_usage_error(fanfold, docs, words, said):
    refused(fanfold("embed", docs, "-o", "out", *words), 2, said, "--help")
    assert tree(docs.parent) == {"docs.jsonl": docs.read_bytes()}


def test_an_unknown_command_is_a_usage_error(fanfold):
    refused(fanfold("embellish"), 2, "embellish", "--help")


def test_no_output_is_refused_with_an_example(fanfold, docs):
    refused(fanfold("embed", docs), 2, "no -o OUT", "-o out/")


def test_a_config_that_is_not_there_is_refused(fanfold, docs):
    refused(fanfold("embed", docs, "-o", "out", "--config", "nope.toml"), 2, "nope.toml")


def test_a_config_with_an_unknown_key_is_refused(fanfold, docs):
    (docs.parent / "job.toml").write_text('colum = "text"\n')
    refused(fanfold("embed", docs, "-o", "out", "--config", "job.toml"), 2, "colum", "column")


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_folder_without_a_run_is_refused(fanfold, command, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    refused(fanfold(command, "other"), 2, "run.json")
    refused(fanfold(command, "nope"), 2, "run.json")
    assert tree(tmp_path) == {"other/mine.txt": b"mine"}
    assert not (tmp_path / "nope").exists()


def test_an_unsupported_system_is_refused(docs, monkeypatch, capsys):
    from fanfold.cli.main import run

    monkeypatch.setattr("platform.system", lambda: "Windows")
    code = run(["embed", str(docs), "-o", str(docs.parent / "out")])
    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    assert "Windows" in shown.err
    assert "Linux" in shown.err
    assert "macOS" in shown.err
    assert all(f"  {name}:" in shown.err for name in ("found", "allowed", "do"))
    assert not (docs.parent / "out").exists()


# -- inputs -------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.usefixtures("demo_model")
class TestInputs:
    """What can be known before the model is loaded is said before, and nothing is made."""

    @pytest.fixture(autouse=True)
    def _nothing_is_made(self, tmp_path, docs):
        before = tree(tmp_path)
        self.known = {}
        yield
        assert tree(tmp_path) == {**before, **self.known}
        assert not list(tmp_path.glob("out*"))

    def make(self, path, data):
        path.write_bytes(data)
        self.known[path.name] = data
        return path

    def test_no_input(self, fanfold):
        refused(fanfold("embed", "-o", "out"), 2, "docs.jsonl")

    def test_no_such_file(self, fanfold):
        refused(fanfold("embed", "nope.jsonl", "-o", "out"), 2, "nope.jsonl", "no such file")

    def test_a_glob_without_a_match(self, fanfold):
        refused(fanfold("embed", "no*.jsonl", "-o", "out"), 2, "no*.jsonl", "no file matches")

    def test_a_suffix_that_names_no_format(self, fanfold, tmp_path):
        self.make(tmp_path / "in.xyz", b"text")
        refused(fanfold("embed", "in.xyz", "-o", "out"), 2, "in.xyz", ".jsonl")

    @pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
    def test_a_missing_column(self, fanfold, tmp_path, form):
        path = tmp_path / f"in.{form}"
        if form == "parquet":
            pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), path)
        else:
            path.write_text({"jsonl": '{"title": "a", "body": "b"}\n', "csv": "title,body\na,b\n"}[form])
        self.known[path.name] = path.read_bytes()
        refused(fanfold("embed", path.name, "-o", "out"), 2, "'text'", "title, body", "--column")

    def test_a_missing_column_on_stdin(self, fanfold):
        refused(fanfold("embed", "-", "-o", "out", stdin=b'{"title": "a"}\n'), 2, "'text'", "title", "standard input")

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
    def test_a_truncated_parquet_file(self, fanfold, tmp_path, share):
        path = tmp_path / "in.parquet"
        pq.write_table(pa.table({"text": [f"text {i}" for i in range(500)]}), path)
        data = path.read_bytes()
        self.make(path, data[: int(len(data) * share)])
        refused(fanfold("embed", path.name, "-o", "out"), 2, "in.parquet")

    def test_a_file_that_is_no_parquet(self, fanfold, tmp_path):
        self.make(tmp_path / "in.parquet", b"not parquet at all " * 50)
        refused(fanfold("embed", "in.parquet", "-o", "out"), 2, "in.parquet")

    def test_a_truncated_gzip_file_whose_head_is_gone(self, fanfold, tmp_path):
        self.make(tmp_path / "in.jsonl.gz", b"\x1f\x8b\x08\x00")
        refused(fanfold("embed", "in.jsonl.gz", "-o", "out"), 2, "in.jsonl.gz")

    def test_inputs_of_two_formats(self, fanfold, tmp_path):
        self.make(tmp_path / "in.csv", b"text\na\n")
        refused(fanfold("embed", "docs.jsonl", "in.csv", "-o", "out"), 2, "docs.jsonl", "in.csv")

    @pytest.mark.parametrize("where", ["cpu:0", "cpu:9999", "nonsense", "cuda:17"])
    def test_a_place_that_is_not_there(self, fanfold, where):
        done = fanfold("embed", "docs.jsonl", "-o", "out", "--on", where)
        refused(done, 2, f"--on {where}", "leave")

    @pytest.mark.parametrize(
        ("flag", "value", "said"),
        [
            ("--on-error", "maybe", "quarantine, null, stop"),
            ("--limit", "-1", "0 or more"),
            ("--dtype", "int8", "float32, bfloat16"),
            ("--max-length", "100000", "512"),
            ("--chunk", "100000", "512"),
            ("--chunk", "2", "512"),
            ("--overlap", "16", "--chunk"),
            ("--merge", "mean", "--chunk"),
            ("--max-failures", "lots", "--max-failures"),
            ("--memory-per-unit", "lots", "--memory-per-unit"),
            ("--prompt-name", "nope", "nope"),
            ("--keep", "nope", "nope"),
            ("--id", "nope", "nope"),
        ],
    )
    def test_a_value_that_is_not_allowed(self, fanfold, flag, value, said):
        refused(fanfold("embed", "docs.jsonl", "-o", "out", flag, value), 2, said)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--chunk", "64", "--overlap", "64"), "0 to 63"),
            (("--chunk", "64", "--overlap", "-1"), "0 to 63"),
            (("--chunk", "64", "--merge", "median"), "mean"),
            (("--chunk", "64", "--max-length", "32"), "leave --max-length away"),
        ],
    )
    def test_parts_that_cannot_be(self, fanfold, words, said):
        refused(fanfold("embed", "docs.jsonl", "-o", "out", *words), 2, said)

    def test_a_result_name_that_the_input_has(self, fanfold, tmp_path):
        self.make(tmp_path / "in.csv", b"text,embedding\na,b\n")
        refused(fanfold("embed", "in.csv", "-o", "out"), 2, "embedding", "--prefix")

    def test_a_traceback_only_with_verbose(self, fanfold):
        done = fanfold("embed", "nope.jsonl", "-o", "out", "--verbose")
        assert done.code == 2
        assert "Traceback" in done.err
        assert done.out == ""

    def test_json_prints_nothing_on_stdout_where_there_is_no_summary(self, fanfold):
        refused(fanfold("embed", "nope.jsonl", "-o", "out", "--json"), 2, "nope.jsonl")


# -- outputs ------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.usefixtures("demo_model")
class TestOutputs:
    @pytest.mark.parametrize("words", [(), ("--overwrite",)])
    def test_a_folder_that_holds_something_else(self, fanfold, docs, tmp_path, words):
        (tmp_path / "out" / "data").mkdir(parents=True)
        (tmp_path / "out" / "mine.txt").write_text("mine")
        (tmp_path / "out" / "data" / "also.txt").write_text("mine too")
        before = tree(tmp_path)
        refused(fanfold("embed", "docs.jsonl", "-o", "out", *words), 2, "mine.txt", "nothing was changed")
        assert tree(tmp_path) == before
        assert not (tmp_path / "out" / "run.json").exists()

    @pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.csv"])
    def test_a_file_that_no_run_made(self, fanfold, docs, tmp_path, name):
        (tmp_path / name).write_text("mine")
        before = tree(tmp_path)
        refused(fanfold("embed", "docs.jsonl", "-o", name), 2, name, "--overwrite")
        assert tree(tmp_path) == before

    def test_a_file_where_a_folder_should_be(self, fanfold, docs, tmp_path):
        (tmp_path / "out").write_text("mine")
        before = tree(tmp_path)
        refused(fanfold("embed", "docs.jsonl", "-o", "out"), 2, "out")
        assert tree(tmp_path) == before

    def test_a_file_in_the_way_to_the_folder(self, fanfold, docs, tmp_path):
        (tmp_path / "out").write_text("mine")
        before = tree(tmp_path)
        done = fanfold("embed", "docs.jsonl", "-o", "out/deeper")
        refused(done, done.code, "out")
        assert done.code in (1, 2)
        assert tree(tmp_path) == before

    def test_the_input_as_output(self, fanfold, docs, tmp_path):
        before = tree(tmp_path)
        refused(fanfold("embed", "docs.jsonl", "-o", "docs.jsonl", "--overwrite"), 2, "docs.jsonl")
        assert tree(tmp_path) == before

    def test_a_read_only_folder(self, fanfold, docs, tmp_path):
        """Permission bits do not bind root: a read-only mount in a mount namespace of its own does."""
        (tmp_path / "frozen").mkdir()
        mount = 'mount -t tmpfs -o ro none frozen && exec "$@"'
        before = ("unshare", "--mount", "sh", "-c", mount, "sh")
        if shutil.which("unshare") is None or subprocess.run([*before, "true"], cwd=tmp_path, check=False).returncode:
            pytest.skip("this machine does not let us mount a read-only file system (unshare --mount)")
        for name in ("frozen", "frozen/out", "frozen/out.parquet"):
            done = fanfold("embed", "docs.jsonl", "-o", name, before=before)
            refused(done, 2, "Read-only file system", "frozen", "-o")

    @pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
    def test_a_folder_without_permission(self, fanfold, docs, tmp_path):
        (tmp_path / "frozen").mkdir(mode=0o500)
        refused(fanfold("embed", "docs.jsonl", "-o", "frozen"), 2, "Permission denied", "frozen", "-o")


# -- models -------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return (os.system, ("touch EXPLODED",))


@pytest.mark.torch
class TestModels:
    @pytest.fixture
    def model(self, demo_model, tmp_path):
        """A copy of the demo model that may be damaged; its weights are a link."""
        folder = tmp_path / "model"
        shutil.copytree(demo_model, folder, copy_function=os.symlink)
        return folder

    def test_no_such_folder(self, fanfold, docs, demo_model):
        refused(fanfold("embed", docs, "-o", "out", "--model", "./nope"), 2, "./nope", "no such folder")

    def test_an_id_that_is_not_in_the_cache(self, fanfold, docs, demo_model):
        done = fanfold("embed", docs, "-o", "out", "--model", "no-such-org/no-such-model")
        refused(done, 2, "no-such-org/no-such-model", "folder", soon=False)
        assert not (docs.parent / "out").exists()

    def test_a_file_instead_of_a_folder(self, fanfold, docs, demo_model):
        refused(fanfold("embed", docs, "-o", "out", "--model", "docs.jsonl"), 2, "a file, not a folder")

    def test_without_config(self, fanfold, docs, model):
        (model / "config.json").unlink()
        refused(fanfold("embed", docs, "-o", "out", "--model", "model"), 2, "no config.json", "save_pretrained")

    @pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
    def test_with_a_damaged_config(self, fanfold, docs, model, content):
        (model / "config.json").unlink()
        (model / "config.json").write_text(content)
        refused(fanfold("embed", docs, "-o", "out", "--model", "model"), 2, "config.json")

    def test_without_tokenizer(self, fanfold, docs, model):
        for name in ("tokenizer.json", "vocab.txt", "vocab.json"):
            (model / name).unlink(missing_ok=True)
        refused(fanfold("embed", docs, "-o", "out", "--model", "model"), 2, "no tokenizer", "save_pretrained")

    def test_without_weights(self, fanfold, docs, model):
        (model / "model.safetensors").unlink()
        refused(fanfold("embed", docs, "-o", "out", "--model", "model"), 2, "no *.safetensors")

    def test_with_pickled_weights(self, fanfold, docs, model):
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
        refused(fanfold("embed", docs, "-o", "out", "--model", "model"), 6, "pickled", "pytorch_model.bin")
        assert not list(docs.parent.rglob("EXPLODED"))

    @pytest.mark.parametrize("left_bytes", [0, 5, 1000, -1])
    def test_with_truncated_weights(self, fanfold, docs, model, demo_model, left_bytes):
        (model / "model.safetensors").unlink()
        with (demo_model / "model.safetensors").open("rb") as file:
            data = file.read(left_bytes)
        (model / "model.safetensors").write_bytes(data if left_bytes >= 0 else data[:-1])
        refused(fanfold("embed", docs, "-o", "out", "--model", "model"), 6, "model.safetensors", "truncated")

    def test_nothing_is_made(self, fanfold, docs, model):
        (model / "config.json").unlink()
        fanfold("embed", docs, "-o", "out", "--model", "model")
        assert not (docs.parent / "out").exists()


# -- rows ---------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.usefixtures("demo_model")
class TestRows:
    def test_bad_rows_are_set_aside_and_the_others_computed(self, fanfold, tmp_path):
        """One job with every kind of bad row: not JSON, wrong type, null, invalid UTF-8; equal ids; 10 MB."""
        lines = [
            b'{"id": "a", "text": "a text"}',
            b'{"id": "b", "text": "cut off',
            b'{"id": "c", "text": 5}',
            b'{"id": "d", "text": null}',
            b'{"id": "e", "text": "\xff\xfe"}',
            b'{"id": "f", "text": ["a", "list"]}',
            b'{"id": "a", "text": "the same id again"}',
            b'{"id": "big", "text": "' + b"ten million letters " * 500_000 + b'"}',
            b"",
            b'{"id": "h", "text": ""}',
        ]
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        done = fanfold("embed", "in.jsonl", "-o", "out", "--id", "id", "--keep", "id", "--on", "inline", "--json")
        assert done.code == 3, done.err
        assert "Traceback" not in done.err
        summary = json.loads(done.out)
        table = pq.read_table(tmp_path / "out" / "data")
        failed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
        assert {line["error"] for line in failed} == {"BadRecord", "NotText", "NullText", "BadUtf8"}
        assert [line["row"] for line in failed] == [1, 2, 3, 4, 5]
        assert [line["id"] for line in failed] == [None, "c", "d", None, "f"]
        assert table.column("id").to_pylist() == ["a", "a", "big", "h"]
        assert table.column("row").to_pylist()[:3] == [0, 6, 7]
        assert summary["rows_in"] == summary["rows_ok"] + summary["rows_failed"] == len(failed) + 4
        assert summary["truncated"] == 1
        for line in failed:
            assert f"in.jsonl, line {line['row'] + 1}" in line["message"]
            assert len(line["message"]) < 400

    @pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.txt"])
    def test_an_empty_file_is_a_job_without_rows(self, fanfold, tmp_path, name):
        (tmp_path / name).write_bytes(b"")
        done = fanfold("embed", name, "-o", "out.parquet", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["rows_in"] == 0
        table = pq.read_table(tmp_path / "out.parquet")
        assert table.num_rows == 0
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 384)
        assert (tmp_path / "out.parquet.run" / "_SUCCESS").exists()

    def test_nothing_but_bad_rows_is_a_failure(self, fanfold, tmp_path):
        (tmp_path / "in.jsonl").write_bytes(b"nonsense\n" * 3)
        done = fanfold("embed", "in.jsonl", "-o", "out", "--on", "inline")
        refused(done, 1, "none of 3 rows", "BadRecord", "quarantine.jsonl", soon=False)
