"""What makes two commands the same job; where they differ, every key is named."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from fanfold.data.source import InputFile
from fanfold.errors import ResumeError
from fanfold.job.fingerprint import check_same, fingerprint
from fanfold.job.request import Request
from fanfold.plan.numerics import Numerics

MACHINE = SimpleNamespace(cpu_vendor="GenuineIntel", isa="avx2", cores=4, memory_bytes=10**9, cpu_name="a CPU")
TASK = SimpleNamespace(record={"task": "embed", "model_files": {"model.safetensors": "9f3c" * 16}, "max_length": 256})


def made(*, files=None, request=None, numerics=None, task=TASK, machine=MACHINE, format_name="parquet", **options):
    files = files or [InputFile(path="/data/docs.jsonl", size_bytes=10, mtime_ns=1)]
    return fingerprint(
        source=SimpleNamespace(files=tuple(files)),
        task=task,
        request=request or Request(inputs=("docs.jsonl",), out="out", **options),
        numerics=numerics or Numerics(),
        format_name=format_name,
        machine=machine,
    )


def difference(stored, wanted):
    with pytest.raises(ResumeError) as refused:
        check_same(stored, wanted, "out/")
    error = refused.value
    assert error.exit_code == 2
    assert error.asked == "continuing the job in out/"
    assert error.found.startswith("it was started as a different job:\n")
    assert error.allowed == "the same inputs, model, settings and library versions"
    assert error.do == "use another output folder, or start anew with --overwrite"
    return [line.strip() for line in error.found.splitlines()[1:]]


def test_the_same_job_is_the_same():
    check_same(made(), made(), "out/")
    check_same({}, {}, "out/")


@pytest.mark.parametrize(
    "options",
    [
        {"on": "inline"},
        {"on": "cpu:7"},
        {"memory_per_unit": "2GB"},
        {"max_failures": "5%"},
        {"overwrite": True},
        {"dry_run": True},
        {"on_error": "stop"},
    ],
)
def test_where_and_how_carefully_a_job_runs_is_not_part_of_it(options):
    check_same(made(), made(**options), "out/")


def test_how_much_machine_there_is_is_not_part_of_a_job():
    other = SimpleNamespace(**{**vars(MACHINE), "cores": 64, "memory_bytes": 1, "cpu_name": "another CPU"})
    check_same(made(), made(machine=other), "out/")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"column": "body"}, "settings.column: 'text' then, 'body' now"),
        ({"id": "key"}, "settings.id: None then, 'key' now"),
        ({"keep": "none"}, "settings.keep: 'all' then, 'none' now"),
        ({"keep": ("a", "b")}, "settings.keep: 'all' then, ['a', 'b'] now"),
        ({"limit": 5}, "settings.limit: None then, 5 now"),
        ({"prefix": "p_"}, "settings.prefix: '' then, 'p_' now"),
        ({"on_error": "null"}, "settings.failed_as_null: False then, True now"),
        ({"format_name": "csv"}, "settings.format: 'parquet' then, 'csv' now"),
        ({"numerics": Numerics(batch_tokens=4096)}, "numerics.batch_tokens: 2048 then, 4096 now"),
        ({"numerics": Numerics(dtype="bfloat16")}, "numerics.dtype: 'float32' then, 'bfloat16' now"),
        ({"machine": SimpleNamespace(cpu_vendor="GenuineIntel", isa="avx512")}, "cpu.isa: 'avx2' then, 'avx512' now"),
    ],
)
def test_a_setting_that_shapes_the_output_is_named(options, line):
    assert difference(made(), made(**options)) == [line]


def test_another_model_is_named_by_its_file():
    task = SimpleNamespace(record=copy.deepcopy(TASK.record))
    task.record["model_files"]["model.safetensors"] = "77ab" * 16
    (line,) = difference(made(), made(task=task))
    assert line.startswith("task.model_files.model.safetensors: '9f3c9f3c")
    assert "then, '77ab77ab" in line
    assert line.endswith("now")


def test_a_model_file_that_came_or_went_is_named():
    task = SimpleNamespace(record={**TASK.record, "model_files": {}})
    (line,) = difference(made(), made(task=task))
    assert line.startswith("task.model_files.model.safetensors: ")
    assert line.endswith("then, None now")


def test_another_version_of_a_library_is_named():
    stored, wanted = made(), made()
    stored["versions"] = {**stored["versions"], "torch": "1.0"}
    (line,) = difference(stored, wanted)
    assert line.startswith("versions.torch: '1.0' then, ")


def test_every_difference_is_named():
    lines = difference(made(), made(column="body", limit=5, numerics=Numerics(window_rows=64)))
    assert [line.split(":")[0] for line in lines] == [
        "numerics.window_rows",
        "settings.column",
        "settings.limit",
    ]


def test_many_differences_are_counted():
    lines = difference({"task": {str(i): 0 for i in range(25)}}, {"task": {str(i): 1 for i in range(25)}})
    assert len(lines) == 11
    assert lines[-1] == "and 15 more"


def test_long_values_are_shortened():
    (line,) = difference({"settings": {"prefix": "a" * 500}}, {"settings": {"prefix": "b" * 500}})
    assert len(line) < 200
    assert "..." in line


# -- inputs: the person must learn which file it is (FAULTS.md, row 22) -----------------------------------


def files(*changes):
    listed = [
        InputFile(
            path=f"/a/rather/long/folder/for/the/data/of/the/year/2026/part-{i:05d}.jsonl", size_bytes=100, mtime_ns=1
        )
        for i in range(3)
    ]
    for i, size_bytes in changes:
        listed[i] = InputFile(path=listed[i].path, size_bytes=size_bytes, mtime_ns=2)
    return listed


def test_a_changed_input_is_named():
    lines = difference(made(files=files()), made(files=files((1, 120))))
    assert "part-00001.jsonl" in "\n".join(lines)
    assert "part-00000.jsonl" not in "\n".join(lines)
    assert "120" in "\n".join(lines)


@pytest.mark.parametrize(("then", "now"), [(slice(0, 2), slice(0, 3)), (slice(0, 3), slice(0, 2))])
def test_an_input_that_came_or_went_is_named(then, now):
    lines = difference(made(files=files()[then]), made(files=files()[now]))
    assert "part-00002.jsonl" in "\n".join(lines)


def test_a_renamed_input_is_named():
    renamed = [*files()[:2], InputFile(path="/other.jsonl", size_bytes=100, mtime_ns=1)]
    assert "/other.jsonl" in "\n".join(difference(made(files=files()), made(files=renamed)))


def test_a_fingerprint_survives_json():
    import json

    assert json.loads(json.dumps(made(keep=("a", "b"), limit=5))) == made(keep=("a", "b"), limit=5)
