"""A run folder that exists already, opened for reading: its records, its source, its task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold.data import journal
from fanfold.data.folder import RUN, Output, read_json
from fanfold.data.run_folder import RunFolder, local_path
from fanfold.errors import InputError
from fanfold.job.log import settle

if TYPE_CHECKING:
    from pathlib import Path

    from fanfold.data.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRun:
    """What is known of a run. `output` may hold parts (a folder) or be one file."""

    output: Output
    store: Store
    run: dict[str, Any]
    entries: list[dict[str, Any]]

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The committed parts in row order."""
        found = {entry["part"]: entry for entry in self.entries if entry["kind"] == "part"}
        return [entry for _, entry in sorted(found.items())]

    @property
    def windows(self) -> dict[int, dict[str, Any]]:
        """The prepared windows by index."""
        return {entry["window"]: entry for entry in self.entries if entry["kind"] == "window"}

    @property
    def leases(self) -> dict[int, list[dict[str, Any]]]:
        """The committed leases by window."""
        found: dict[int, list[dict[str, Any]]] = {}
        for entry in self.entries:
            if entry["kind"] == "lease":
                found.setdefault(entry["window"], []).append(entry)
        return found


def open_existing(out: str | Path) -> OpenedRun:
    """The run that `out` names (the folder, the file, or the file's .run folder); InputError if it is none."""
    path = local_path(out)
    if path is not None and path.name.endswith(".run") and (path / RUN).exists():
        path = path.with_name(path.name.removesuffix(".run"))
    output = Output(out if path is None else path)
    store = RunFolder(place=output.place).open_to_write()
    run = read_json(store, RUN)
    if run is None:
        raise InputError(
            f"the run in {out}",
            found="no run.json there",
            allowed="a folder or file that a run of Fanfold has written",
            do="check the path",
        )
    return OpenedRun(output=output, store=store, run=run, entries=settle(journal.load(store, repair=False)))
