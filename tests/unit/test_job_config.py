"""A TOML file gives the flags that the command line leaves open."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from fanfold.cli.main import run as command_line
from fanfold.errors import RequestError
from fanfold.job.command import EmbedFlags, run_verb, with_config

TypeAdapter(EmbedFlags)  # pydantic imports a lot at the first use: outside of any test's time


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "job.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(path, flags=None):
    with pytest.raises(RequestError) as error:
        with_config(flags or EmbedFlags(), path)
    assert error.value.exit_code == 2
    assert error.value.asked == f"--config {path}"
    return error.value


def test_the_file_gives_every_flag(config):
    path = config(
        """
        task = "embed"
        inputs = ["a.jsonl", "b/*.jsonl"]
        out = "out/"
        model = "org/name"
        column = "body"
        on = "cpu:2"
        keep = ["id", "title"]
        id = "key"
        prefix = "p_"
        prefix_text = "query: "
        max_length = 128
        dtype = "bfloat16"
        revision = "main"
        on_error = "null"
        max_failures = "5%"
        memory_per_unit = "2GB"
        limit = 10
        overwrite = true
        dry_run = true
        """
    )
    assert with_config(EmbedFlags(), path) == EmbedFlags(
        inputs=("a.jsonl", "b/*.jsonl"),
        out="out/",
        model="org/name",
        column="body",
        on="cpu:2",
        keep=("id", "title"),
        id="key",
        prefix="p_",
        prefix_text="query: ",
        max_length=128,
        dtype="bfloat16",
        revision="main",
        on_error="null",
        max_failures="5%",
        memory_per_unit="2GB",
        limit=10,
        overwrite=True,
        dry_run=True,
    )


def test_an_empty_file_changes_nothing(config):
    assert with_config(EmbedFlags(column="body"), config("")) == EmbedFlags(column="body")


def test_names_may_be_written_as_on_the_command_line(config):
    flags = with_config(EmbedFlags(), config('max-length = 64\non-error = "stop"\ndry-run = true'))
    assert (flags.max_length, flags.on_error, flags.dry_run) == (64, "stop", True)


def test_one_input_needs_no_list(config):
    assert with_config(EmbedFlags(), config('inputs = "a.jsonl"')).inputs == ("a.jsonl",)


def test_flags_win_over_the_file(config):
    path = config('column = "body"\nlimit = 10\ninputs = ["a"]\nkeep = "none"')
    flags = with_config(EmbedFlags(column="abstract", limit=5, inputs=("b",), keep=("id",)), path)
    assert flags == EmbedFlags(column="abstract", limit=5, inputs=("b",), keep=("id",))


def test_the_file_wins_over_defaults(config):
    assert with_config(EmbedFlags(limit=5), config('column = "body"')) == EmbedFlags(column="body", limit=5)


@pytest.mark.parametrize(("text", "kept"), [("all", "all"), ("none", "none"), ("id,title", ("id", "title"))])
def test_keep_is_read_as_on_the_command_line(config, text, kept):
    """A text with commas is names there; taken as it stands, it would keep nothing at all."""
    assert with_config(EmbedFlags(), config(f'keep = "{text}"')).keep == kept


def test_a_key_that_is_no_flag_is_refused(config):
    error = refused(config('colum = "body"\nzeta = 1\nlimit = 5'))
    assert error.found == "unknown key(s) colum, zeta"
    assert "column" in error.allowed.split(", ")
    assert error.do == "correct the file"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("limit = 1.5", "limit"),
        ('limit = "many"', "limit"),
        ("column = 5", "column"),
        ("inputs = [1, 2]", "inputs"),
        ("overwrite = 7", "overwrite"),
        ("[model]\nname = 1", "model"),
        ("max_length = [1]", "max_length"),
        ("limit = 2026-01-01", "limit"),
    ],
)
def test_a_value_of_a_wrong_type_is_errorby_name(config, line, key):
    error = refused(config(line))
    assert error.found.startswith(f"{key}")
    assert error.allowed == "the types of the command's flags"


@pytest.mark.parametrize(
    "content", ["column = ", "column = 'a'\ncolumn = 'b'", "= 1", b"\xff\xfe", "column = 'a' x", "\0"]
)
def test_a_file_that_is_not_toml_is_refused(config, content):
    error = refused(config(content))
    assert error.allowed == "a TOML file with the command's flags as keys"
    assert error.found.split(":")[0] in ("TOMLDecodeError", "UnicodeDecodeError")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    error = refused(tmp_path / "no.toml")
    assert error.found.startswith("FileNotFoundError: ")


def test_a_folder_is_refused(tmp_path):
    assert refused(tmp_path).found.startswith("IsADirectoryError: ")


@pytest.mark.parametrize("task", ['"generate"', '"embedd"', "5"])
def test_a_task_that_this_command_does_not_do_is_refused(config, task):
    """`fanfold run job.toml` must not embed where the file asks for something else."""
    error = refused(config(f"task = {task}"))
    assert "task" in error.found


# -- through the command line -----------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """What the job would be called with."""
    calls = []

    def run_files(verb, inputs, out, **values):
        calls.append({"verb": verb, "inputs": inputs, "out": out, **values})
        raise RequestError("the job", found="a test", allowed="no job", do="nothing")

    monkeypatch.setattr("fanfold.job.verbs.run_files", run_files)
    return calls


def test_run_carries_out_a_file(config, ran, capsys):
    path = config('task = "embed"\ninputs = ["a.jsonl"]\nout = "out"\ncolumn = "body"')
    assert command_line(["run", str(path)]) == 2
    assert (ran[0]["inputs"], ran[0]["out"], ran[0]["column"]) == (("a.jsonl",), "out", "body")
    capsys.readouterr()


def test_a_flag_given_wins_over_the_file(config, ran, capsys):
    path = config('column = "body"\non = "cpu:2"')
    assert command_line(["embed", "a.jsonl", "-o", "out", "--config", str(path), "--column", "abstract"]) == 2
    assert (ran[0]["column"], ran[0]["on"]) == ("abstract", "cpu:2")
    capsys.readouterr()


def test_a_flag_given_wins_also_where_it_says_what_the_default_says(config, ran, capsys):
    path = config('column = "body"\non = "cuda"')
    assert (
        command_line(["embed", "a.jsonl", "-o", "out", "--config", str(path), "--column", "text", "--on", "cpu"]) == 2
    )
    assert (ran[0]["column"], ran[0]["on"]) == ("text", "cpu")
    capsys.readouterr()


def test_keep_with_commas_is_names(config, ran, capsys):
    command_line(["embed", "a.jsonl", "-o", "out", "--keep", "id,title"])
    assert ran[0]["keep"] == ("id", "title")
    capsys.readouterr()


def test_an_output_is_needed(config):
    with pytest.raises(RequestError) as error:
        run_verb(EmbedFlags(inputs=("a",)), config=None, quiet=True, color=False)
    assert error.value.found == "no -o OUT"


def test_a_missing_config_is_said_in_four_parts(capsys):
    assert command_line(["embed", "a.jsonl", "-o", "out", "--config", "/no/such.toml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("RequestError: --config /no/such.toml\n  found:   FileNotFoundError")
    assert "\n  allowed: " in said
    assert "\n  do:      " in said
