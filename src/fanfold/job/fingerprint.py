"""What makes two commands the same job, and the refusal where they are not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fanfold.errors import ResumeError

if TYPE_CHECKING:
    from fanfold.data.source import Source
    from fanfold.job.request import Request
    from fanfold.machine.discover import Machine
    from fanfold.plan.numerics import Numerics
    from fanfold.tasks.task import Task

_PACKAGES = ("torch", "transformers", "tokenizers")


def fingerprint(
    *, source: Source, task: Task, request: Request, numerics: Numerics, format_name: str, machine: Machine
) -> dict[str, Any]:
    """Everything that shapes the output, as plain values."""
    return {
        "inputs": [{"path": file.path, "bytes": file.size_bytes, "mtime_ns": file.mtime_ns} for file in source.files],
        "task": task.record,
        "settings": {**request.record, "format": format_name},
        "numerics": numerics.record(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cpu": {"vendor": machine.cpu_vendor, "isa": machine.isa},
    }


def check_same(stored: dict[str, Any], wanted: dict[str, Any], folder: str) -> None:
    """ResumeError that names every key that differs."""
    differences = list(_differences("", stored, wanted))
    if not differences:
        return
    shown = "\n           ".join(differences[:10])
    more = f"\n           and {len(differences) - 10} more" if len(differences) > 10 else ""
    raise ResumeError(
        f"continuing the job in {folder}",
        found=f"it was started as a different job:\n           {shown}{more}",
        allowed="the same inputs, model, settings and library versions",
        do="use another output folder, or start anew with --overwrite",
    )


def _differences(path: str, stored: Any, wanted: Any) -> list[str]:
    if path == "inputs" and isinstance(stored, list) and isinstance(wanted, list):
        return _input_differences(stored, wanted)
    if isinstance(stored, dict) and isinstance(wanted, dict):
        found: list[str] = []
        for key in sorted({*stored, *wanted}):
            found += _differences(f"{path}.{key}".lstrip("."), stored.get(key), wanted.get(key))
        return found
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        return [
            line
            for i, (old, new) in enumerate(zip(stored, wanted, strict=True))
            for line in _differences(f"{path}[{i}]", old, new)
        ]
    if stored == wanted:
        return []
    return [f"{path}: {_short(stored)} then, {_short(wanted)} now"]


def _input_differences(stored: list[Any], wanted: list[Any]) -> list[str]:
    """By file name: changed, added, removed, or in another order."""
    old, new = ({file["path"]: file for file in files} for files in (stored, wanted))
    found = [f"inputs: {path} is no longer among them" for path in old if path not in new]
    found += [f"inputs: {path} was added" for path in new if path not in old]
    for path in old.keys() & new.keys():
        for key, shown in (("bytes", "size"), ("mtime_ns", "time of change")):
            if old[path][key] != new[path][key]:
                found.append(f"inputs: {path}: {shown} was {old[path][key]}, is {new[path][key]}")
    if not found and [file["path"] for file in stored] != [file["path"] for file in wanted]:
        found.append("inputs: the same files in another order")
    return sorted(found)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
