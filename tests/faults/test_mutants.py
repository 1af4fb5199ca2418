"""Each guard of the commit protocol, taken away: the fault tests must notice. Otherwise they guard nothing."""

from __future__ import annotations

import json

import pytest
from test_commit_protocol import check_late_twin, check_tampered_line_is_refused
from test_crash_states import Job, check_visible, recorded, small_and_quick

from fanfold.data import journal
from fanfold.data.durable import PosixStore
from fanfold.engine.schedule import Schedule
from fanfold.testing.crash import crash_states

pytestmark = pytest.mark.faults

FLUSH, FLUSH_FD = PosixStore._flush, PosixStore._flush_fd


@pytest.fixture(autouse=True)
def _small_and_quick():
    with small_and_quick():
        yield


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path, "out")


def check_states_are_clean(job, mutate):
    """Every state that a crash of the run may leave shows nothing half, and holds what its log says."""
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        record, expected = recorded(job)
    for state in crash_states(record, recent=1):
        state.materialise(job.disk)
        check_visible(job, [expected])


def folders_are_not_synced(patch):
    patch.setattr(PosixStore, "sync_folder", lambda store, name: None)


def folders_are_never_flushed(patch):
    patch.setattr(PosixStore, "_flush", lambda store, path: None if path.is_dir() else FLUSH(store, path))


def files_are_not_flushed(patch):
    patch.setattr(PosixStore, "_flush", lambda store, path: FLUSH(store, path) if path.is_dir() else None)


def parts_are_not_sealed(patch):
    patch.setattr(PosixStore, "seal", lambda store, name: None)


def lines_are_written_before_the_files_are_published(patch):
    """The journal's line first: what it names is not there yet."""
    real, publish = journal.append, PosixStore.put_if_absent
    waiting = []

    def append(store, entries):
        real(store, entries)
        while waiting:
            publish(*waiting.pop(0))
            store.sync_folder("pieces")
            store.sync_folder("data")

    patch.setattr(PosixStore, "put_if_absent", lambda *arguments: waiting.append(arguments) or True)
    patch.setattr(journal, "append", append)


def nothing_is_mutated(patch):
    pass


def test_the_unchanged_protocol_is_clean(job):
    check_states_are_clean(job, nothing_is_mutated)


@pytest.mark.parametrize(
    ("mutate", "noticed"),
    [
        (folders_are_not_synced, "is in the log and not there"),
        (folders_are_never_flushed, "is in the log and not there|_SUCCESS beside"),
        (files_are_not_flushed, "is damaged|Invalid|Expected|Expecting"),
        (parts_are_not_sealed, "is damaged|_SUCCESS beside parts"),
        (lines_are_written_before_the_files_are_published, "is in the log and not there"),
    ],
)
def test_a_missing_flush_or_a_wrong_order_is_noticed(job, mutate, noticed):
    with pytest.raises((AssertionError, OSError, ValueError), match=noticed):
        check_states_are_clean(job, mutate)


def test_a_lease_check_that_takes_everything_is_noticed(job, tmp_path, monkeypatch):
    whole = Job(tmp_path / "whole", "out")
    expected = whole.outcome(whole.run().summary)

    def take_back(schedule, unit, done):
        schedule._out.pop(unit, None)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "_take_back", take_back)
        with pytest.raises(Exception) as noticed:  # which check sees it first does not matter
            check_late_twin(job, expected, monkeypatch)
    print(f"noticed: {noticed.value!r}")
    again = Job(tmp_path / "again", "out")
    check_late_twin(again, expected, monkeypatch)


def test_a_log_whose_checksums_are_not_compared_is_noticed(job, tmp_path, monkeypatch):
    def decode(line):
        try:
            return json.loads(line[9:])
        except ValueError:
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "decode", decode)
        with pytest.raises(BaseException) as noticed:  # pytest's own "did not raise" included
            check_tampered_line_is_refused(job, monkeypatch)
    assert not isinstance(noticed.value, KeyboardInterrupt | SystemExit)
    print(f"noticed: {noticed.value!r}")
    check_tampered_line_is_refused(Job(tmp_path / "again", "out"), monkeypatch)
