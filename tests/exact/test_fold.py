"""`fold` and `map`: the same bits wherever they run, the same kind out as in, and errors that name the piece."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pyarrow as pa
import pytest

import fanfold as ff
from fanfold.errors import DataError, PieceFailed, PlanError

EVERYWHERE = ["inline", "threads:2", "threads:3", "cpu:2", "cpu:3", "auto"]
PROCESSES = pytest.mark.slow  # worker processes take a moment to be there
WHERE = [pytest.param(on, marks=PROCESSES) if on.startswith("cpu") else on for on in EVERYWHERE]
X = np.random.default_rng(0).standard_normal(300_000)


def gauss(x):
    return np.exp(-(x**2))


@pytest.fixture(scope="module", autouse=True)
def workers_end():
    yield
    ff.shutdown()


@pytest.mark.parametrize("on", WHERE)
def test_the_bits_of_a_mean_do_not_depend_on_where(on):
    assert ff.fold(gauss, X, ff.Mean(), on=on) == ff.fold(gauss, X, ff.Mean(), on="inline")
    assert ff.fold(gauss, X, ff.Mean(), on=on, pieces=7) == ff.fold(gauss, X, ff.Mean(), on="inline", pieces=7)


@pytest.mark.parametrize("pieces", [1, 2, 7, 1000])
def test_a_sum_does_not_depend_on_the_cut_beyond_the_last_bit(pieces):
    whole = ff.fold(gauss, X, ff.Sum(), on="inline")
    assert abs(ff.fold(gauss, X, ff.Sum(), pieces=pieces, on="inline") - whole) <= np.spacing(whole)


def test_the_mean_is_numpys():
    assert ff.fold(gauss, X, ff.Mean()) == pytest.approx(gauss(X).mean(), rel=1e-14)


@pytest.mark.parametrize("on", WHERE)
def test_a_product_of_matrices_has_the_same_bits_everywhere(on):
    x = np.random.default_rng(1).standard_normal((2000, 96)).astype("float32")
    weight = np.random.default_rng(2).standard_normal((96, 64)).astype("float32")
    assert np.array_equal(ff.map(lambda p: p @ weight, x, on=on), ff.map(lambda p: p @ weight, x, on="inline"))


def kinds():
    import pandas as pd
    import polars as pl

    rows = list(range(5000))
    return {
        "list": (rows, lambda p: [v * 2 for v in p]),
        "tuple": (tuple(rows), lambda p: tuple(v * 2 for v in p)),
        "array": (np.arange(50_000.0), lambda p: p * 2),
        "matrix": (np.ones((5000, 300)), lambda p: p.sum(1)),
        "arrow": (pa.table({"a": rows}), lambda t: t.append_column("b", t.column("a"))),
        "pandas": (pd.DataFrame({"a": rows}), lambda t: t.assign(b=t.a * 2)),
        "series": (pd.Series(rows), lambda s: s + 1),
        "polars": (pl.DataFrame({"a": rows}), lambda t: t.with_columns(b=pl.col("a") * 2)),
    }


@pytest.mark.parametrize("on", WHERE)
@pytest.mark.parametrize("kind", ["list", "tuple", "array", "matrix", "arrow", "pandas", "series", "polars"])
def test_the_same_kind_comes_out_as_went_in(kind, on):
    pytest.importorskip("pandas", reason="pandas is not installed: frames are not tested")
    pytest.importorskip("polars", reason="Polars is not installed: frames are not tested")
    x, f = kinds()[kind]
    found, whole = ff.map(f, x, on=on), f(x)
    assert type(found) is type(whole)
    if hasattr(whole, "equals"):
        assert found.equals(whole)
    else:
        assert np.array_equal(found, whole)


@pytest.mark.torch
@pytest.mark.parametrize("on", ["inline", "threads:2"])
def test_tensors_come_out_as_tensors_and_are_not_written_to(on):
    import torch

    x = torch.arange(100_000, dtype=torch.float64)
    assert torch.equal(ff.map(lambda p: p * 2, x, on=on), x * 2)
    with pytest.raises(PieceFailed, match="piece") as caught:
        ff.map(lambda p: p.mul_(1), x, on=on)
    assert "wrote to the tensor" in str(caught.value)


@pytest.mark.parametrize("on", WHERE)
def test_each_is_what_pool_map_gives(on):
    assert ff.map(str, range(3000), on=on, each=True) == [str(v) for v in range(3000)]
    assert ff.map(lambda v: v + 1, [3, 1], on=on, each=True) == [4, 2]
    assert np.array_equal(ff.map(lambda v: v * v, np.arange(10), on=on, each=True), np.arange(10) ** 2)


class Loaded:
    def __init__(self):
        self.pid, self.calls = os.getpid(), 0

    def __call__(self, piece):
        self.calls += 1
        return [(self.pid, id(self), self.calls)] * len(piece)


@pytest.mark.parametrize(("on", "units"), [("inline", 1), ("threads:2", 2), pytest.param("cpu:2", 2, marks=PROCESSES)])
def test_a_class_is_loaded_once_per_unit(on, units):
    found = ff.map(Loaded, list(range(4000)), on=on)
    makers = {(pid, number) for pid, number, _ in found}
    assert 1 <= len(makers) <= units
    assert max(calls for _, _, calls in found) > 1


class LoadedRow(Loaded):
    def __call__(self, row):
        return super().__call__([row])[0]


@pytest.mark.parametrize(("on", "units"), [("inline", 1), ("threads:2", 2), pytest.param("cpu:2", 2, marks=PROCESSES)])
def test_a_class_that_is_called_with_rows_is_loaded_once_per_unit_too(on, units):
    found = ff.map(LoadedRow, list(range(4000)), on=on, each=True)
    assert 1 <= len({(pid, number) for pid, number, _ in found}) <= units
    assert len(set(found)) == 4000  # no object is shared by two units: each counts its own calls


def test_a_class_that_auto_tries_and_keeps_in_the_calling_thread_is_loaded_once():
    found = ff.map(Loaded, list(range(300)))
    assert len({number for _, number, _ in found}) == 1


@pytest.mark.parametrize("on", WHERE)
def test_an_exception_names_the_piece_and_shows_the_users_lines(on):
    def broken(piece):
        if 90_000 in piece:
            raise ValueError("no such luck")
        return piece

    with pytest.raises(PieceFailed, match="rows 65536-98303") as caught:
        ff.map(broken, np.arange(200_000.0), on=on)
    assert isinstance(caught.value.__cause__, ValueError)
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.index('raise ValueError("no such luck")') < shown.index("PieceFailed")


@pytest.mark.parametrize("on", WHERE)
def test_writing_to_the_input_is_an_error_and_no_race(on):
    def writes(piece):
        piece += 1
        return piece

    x = np.zeros(100_000)
    with pytest.raises(PieceFailed, match="piece") as caught:
        ff.map(writes, x, on=on)
    assert "x = x.copy()" in str(caught.value)
    assert not x.any()


@pytest.mark.slow
@pytest.mark.faults
def test_a_piece_that_kills_its_process_is_named():
    def dies(piece):
        if 70_000.0 in piece:
            os.kill(os.getpid(), signal.SIGKILL)
        return piece

    with pytest.raises(PieceFailed, match="rows 65536-98303") as caught:
        ff.map(dies, np.arange(200_000.0), on="cpu:2")
    assert "2 processes died" in str(caught.value)
    assert "SIGKILL" in str(caught.value)


@pytest.mark.slow
@pytest.mark.faults
def test_a_process_that_dies_once_costs_nothing(tmp_path):
    once = str(tmp_path / "once")

    def dies_once(piece):
        if 70_000.0 in piece:
            try:
                os.close(os.open(once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return piece
            os.kill(os.getpid(), signal.SIGKILL)
        return piece

    x = np.arange(200_000.0)
    assert np.array_equal(ff.map(dies_once, x, on="cpu:2"), x)


@pytest.mark.slow
def test_what_cannot_be_pickled_is_refused_and_auto_goes_elsewhere():
    lock = threading.Lock()

    def locked(piece):
        with lock:
            return piece

    x = np.zeros(100_000)
    with pytest.raises(PlanError, match="cpu:2") as caught:
        ff.map(locked, x, on="cpu:2")
    assert "on='threads'" in str(caught.value)
    assert np.array_equal(ff.map(locked, x), x)
    with pytest.raises(PlanError, match="rows that cannot be sent"):
        ff.map(lambda p: p, [lock] * 10, on="cpu:2")


@pytest.mark.parametrize("on", WHERE)
def test_wrong_lengths_are_refused_with_the_piece(on):
    with pytest.raises(DataError, match=r"piece \d of 10 \(rows"):
        ff.fold(lambda p: p.mean(), X, ff.Mean(), on=on)
    with pytest.raises(DataError, match="piece") as caught:
        ff.map(lambda p: p[1:], X, on=on)
    assert "ff.Concat()" in str(caught.value)


def test_a_value_for_each_piece_is_declared_and_weighted_by_rows():
    assert ff.fold(lambda p: p.mean(), X, ff.Mean(of="pieces")) == pytest.approx(X.mean(), abs=1e-15)
    found = ff.fold(lambda p: ff.Weighted(p.mean(), len(p)), X, ff.Mean(), pieces=7)
    assert found == pytest.approx(X.mean(), abs=1e-15)


def test_different_shapes_per_piece_are_refused():
    with pytest.raises(DataError, match="all pieces"):
        ff.fold(lambda p: np.ones((len(p), 1 + len(p) % 2)), np.zeros(3), ff.Sum(), pieces=2)


@pytest.mark.parametrize("pieces", [0, -1, 11, 2.0, True])
def test_impossible_numbers_of_pieces_are_refused(pieces):
    with pytest.raises(PlanError, match="pieces="):
        ff.fold(gauss, np.zeros(10), ff.Sum(), pieces=pieces)


@pytest.mark.parametrize("on", ["inline", "threads:2", "auto"])
def test_nothing_has_a_sum_and_no_mean(on):
    assert ff.fold(gauss, np.zeros(0), ff.Sum(), on=on) == 0
    with pytest.raises(DataError, match="take the mean"):
        ff.fold(gauss, np.zeros(0), ff.Mean(), on=on)
    assert ff.map(str, [], each=True, on=on) == []


@pytest.mark.parametrize("on", ["gpu", "threads:0", "cpu:99999", "inline:2", 3])
def test_other_places_are_refused(on):
    with pytest.raises(PlanError, match="on="):
        ff.fold(gauss, X, ff.Mean(), on=on)


def test_what_is_no_function_or_no_merge_is_refused():
    with pytest.raises(PlanError, match="fold 3"):
        ff.fold(3, X, ff.Mean())
    with pytest.raises(PlanError, match="merge by"):
        ff.fold(gauss, X, ff.Mean)


def test_a_cheap_function_on_little_data_runs_inline_and_says_why():
    folded = ff.fold(gauss, np.zeros(1000), ff.Mean(), explain=True)
    assert (folded.value, folded.on, folded.num_pieces) == (1.0, "inline", 1)
    assert "the data is one piece" in str(folded)
    folded = ff.fold(lambda p: [v for v in p], list(range(2000)), ff.Sum(), explain=True)
    assert folded.on == "inline"


def test_generators_are_taken():
    assert ff.fold(lambda p: p, (v for v in range(5000)), ff.Sum()) == sum(range(5000))


@pytest.mark.parametrize("on", ["inline", "threads:2", pytest.param("cpu:2", marks=PROCESSES)])
def test_mapped_files_are_read_in_place(on, tmp_path):
    x = np.memmap(tmp_path / "x", "float64", "w+", shape=(100_000, 2))
    x[:] = 1.5
    x.flush()
    assert np.array_equal(ff.fold(lambda p: p, x, ff.Sum(), on=on), [150_000.0, 150_000.0])
    assert np.array_equal(ff.fold(lambda p: p, x[10:20:2, ::-1], ff.Sum(), on=on), [7.5, 7.5])


@pytest.mark.parametrize("on", WHERE)
def test_several_merges_at_once_by_name(on):
    found = ff.fold(gauss, X, {"mean": ff.Mean(), "sum": ff.Sum(), "rows": ff.Count()}, on=on)
    assert found["rows"] == len(X)
    assert found["mean"] == ff.fold(gauss, X, ff.Mean(), on="inline")
    assert found["sum"] == ff.fold(gauss, X, ff.Sum(), on="inline")


@pytest.mark.slow
def test_what_was_written_to_a_private_map_of_a_file_is_what_processes_see(tmp_path):
    np.zeros(100_000).tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", "float64", "c")
    x[:] = 2.0
    assert ff.fold(lambda p: p, x, ff.Sum(), on="cpu:2") == 200_000.0


@pytest.mark.slow
def test_results_that_cannot_come_back_from_a_process_are_refused_with_the_piece():
    def locks(piece):
        return [threading.Lock() for _ in piece]

    with pytest.raises(PlanError, match="piece 0 of 4") as caught:
        ff.fold(locks, list(range(100)), ff.Concat(), on="cpu:2", pieces=4)
    assert "cannot be sent back" in str(caught.value)
    assert "on='threads'" in str(caught.value)
    assert len(ff.fold(locks, list(range(100)), ff.Concat(), on="threads:2", pieces=4)) == 100


@pytest.mark.slow
@pytest.mark.parametrize("on", ["inline", "threads:2", "cpu:2"])
def test_of_several_failing_pieces_the_first_is_named_however_fast_the_others_fail(on):
    def later_fails_sooner(piece):
        if piece[0] < 20:
            time.sleep(0.5)
        raise ValueError(f"row {piece[0]}")

    with pytest.raises(PieceFailed, match="piece 0 of 10") as caught:
        ff.fold(later_fails_sooner, list(range(100)), ff.Concat(), on=on, pieces=10)
    assert str(caught.value.__cause__) == "row 0"


@pytest.mark.parametrize("on", WHERE)
def test_results_that_do_not_go_together_are_refused_with_a_piece(on):
    with pytest.raises(DataError, match=r"piece \d of 10 \(rows") as caught:
        ff.map(lambda p: p.astype("float32" if p[0] > 0 else "float64"), X, on=on)
    assert "one kind, dtype" in str(caught.value)


@pytest.mark.parametrize("weights", [np.ones(3), np.full(32_768, np.nan), np.full(32_768, -1.0), float("nan")])
def test_weights_that_do_not_match_or_weigh_nothing_sensible_are_refused(weights):
    x = np.random.default_rng(0).standard_normal(3 * 32_768)
    with pytest.raises(DataError, match=r"piece 0 of 3 \(rows 0-32767\)"):
        ff.fold(lambda p: ff.Weighted(p if np.ndim(weights) else p.mean(), weights), x, ff.Mean(), on="inline")


@pytest.mark.parametrize("x", [3.0, None, {"a": 1}, {1, 2}, b"bytes", np.array(3.0), np.array([object()])])
def test_what_cannot_be_cut_into_pieces_is_refused(x):
    with pytest.raises(PlanError, match="split data") as caught:
        ff.fold(gauss, x, ff.Mean())
    assert "list(x)" in str(caught.value)


@pytest.mark.parametrize("on", WHERE)
def test_a_fold_inside_a_function_that_is_folded_runs_where_it_can(on):
    def inner(piece):
        return [ff.fold(lambda values: [2 * v for v in values], list(range(row)), ff.Sum()) for row in piece]

    rows = list(range(60))
    assert ff.map(inner, rows, on=on) == inner(rows)


FORKED = """
import os, sys
import numpy as np
import fanfold as ff

x = np.arange(100_000.0)
ff.fold(lambda p: p, x, ff.Sum(), on="cpu:2")
pid = os.fork()
factor = 5 if pid else 2
for _ in range(4):
    assert ff.fold(lambda p: p * factor, x, ff.Sum(), on="cpu:2") == factor * x.sum()
if not pid:
    ff.shutdown()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert ff.fold(lambda p: p, x, ff.Sum(), on="cpu:2") == x.sum()
print("both")
"""


@pytest.mark.slow
def test_a_program_that_forks_has_workers_of_its_own_in_both_halves():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "both\n", done.stderr


# -- found by trying it as a new user would --------------------------------------------------------------


class Reuses:
    """Gives the same memory for every piece."""

    def __init__(self):
        self.buffer = np.empty(32_768)

    def __call__(self, piece):
        out = self.buffer[: len(piece)]
        np.multiply(piece, 2, out=out)
        return out


@pytest.mark.parametrize("on", WHERE)
def test_a_function_may_give_the_same_memory_again(on):
    assert np.array_equal(ff.map(Reuses, X, on=on), X * 2)
    buffer = np.zeros(3)

    def sums(piece):
        buffer[:] = piece.sum()
        return buffer

    whole = sum(X[start : start + 32_768].sum() for start in range(0, len(X), 32_768))
    if on == "inline":  # on threads this one would race: it writes to what they share
        assert ff.fold(sums, X, ff.Sum(of="pieces"), on=on)[0] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("kind", ["arrow", "pandas", "polars"])
def test_rows_of_frames_are_dicts_one_by_one(kind):
    pytest.importorskip("pandas", reason="pandas is not installed: frames are not tested")
    pytest.importorskip("polars", reason="Polars is not installed: frames are not tested")
    frame = kinds()[kind][0]
    assert ff.map(lambda row: row["a"] + 1, frame, each=True, on="inline") == list(range(1, 5001))


def test_arrays_with_rules_of_their_own_are_refused():
    masked = np.ma.array(np.arange(1e5), mask=np.arange(100_000) % 2 == 0)
    with pytest.raises(PlanError, match="split data"):
        ff.fold(lambda p: p, masked, ff.Mean())
    with pytest.raises(DataError, match="piece 0") as caught:
        ff.fold(lambda p: np.ma.masked_less(p, 0), X, ff.Mean())
    assert "filled(0)" in str(caught.value)


def test_weighted_rows_may_be_complex_and_texts_are_refused():
    assert ff.fold(lambda p: ff.Weighted(p + 1j, np.ones(len(p))), np.arange(10.0), ff.Mean()) == 4.5 + 1j
    with pytest.raises(DataError, match="weigh"):
        ff.fold(lambda p: ff.Weighted(["a"] * len(p), np.ones(len(p))), np.arange(10.0), ff.Mean())


class NeedsMore:
    def __init__(self, path):
        raise AssertionError("never called")

    def __call__(self, piece):
        return piece


class DiesEarly:
    def __init__(self):
        if os.environ.get("FANFOLD_IN_WORKER"):
            os._exit(3)

    def __call__(self, piece):
        return piece


class KillsWhereItIsUnpickled:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return (os._exit, (5,)) if self.value == 1500 else (KillsWhereItIsUnpickled, (self.value,))


@pytest.mark.parametrize("on", WHERE)
def test_a_class_that_cannot_be_made_says_so(on):
    with pytest.raises(PieceFailed, match="making an object of NeedsMore"):
        ff.map(NeedsMore, list(range(3000)), on=on)


@pytest.mark.slow
@pytest.mark.faults
def test_processes_that_die_before_their_first_piece_are_not_replaced_for_ever():
    for f, rows in ((DiesEarly, list(range(100))), (EACH, [KillsWhereItIsUnpickled(i) for i in range(3000)])):
        with pytest.raises(PieceFailed, match="piece") as caught:
            ff.map(f, rows, on="cpu:2")
        assert "3 processes died before their first piece" in str(caught.value)


def EACH(piece):
    return [row.value for row in piece]


class MyError(Exception):
    pass


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize("on", WHERE)
def test_the_cause_is_the_functions_own_error_wherever_it_ran(on):
    def broken(piece):
        raise MyError("once")

    def mute(piece):
        raise Mute

    with pytest.raises(PieceFailed) as caught:
        ff.map(broken, X, on=on)
    assert type(caught.value.__cause__).__name__ == "MyError"
    with pytest.raises(PieceFailed, match="piece"):
        ff.map(mute, X, on=on)


class OwnMerge(ff.Count):
    def lift(self, value, rows):
        raise KeyError("oops")


@pytest.mark.parametrize("on", WHERE)
def test_an_error_of_a_merge_names_the_piece(on):
    with pytest.raises(PieceFailed, match=r"OwnMerge\.lift over piece") as caught:
        ff.fold(gauss, X, OwnMerge(), on=on)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.slow
def test_a_stage_in_processes_may_feed_another():
    inner = ff.map(lambda p: [2 * v for v in p], iter(range(3000)), on="cpu:2")
    assert ff.fold(lambda p: p, inner, ff.Sum(), on="cpu:2") == 2 * sum(range(3000))


def test_a_slow_source_is_not_read_dry_before_its_first_result():
    taken = []

    def slow():
        for number in range(40):
            time.sleep(0.05)
            taken.append(number)
            yield number

    found = ff.map(lambda p: p, slow())
    assert next(found) == 0
    assert len(taken) < 12


def test_what_is_known_of_one_partial_is_not_known_of_another():
    from fanfold.job.choice import _named

    assert _named(functools.partial(gauss)) != _named(functools.partial(gauss))
    assert _named(np.exp) != _named(np.sin)
    assert _named(lambda p: p) != _named(gauss)


@pytest.mark.slow
def test_what_processes_mapped_is_given_back_after_the_call():
    x = np.zeros(8_000_000)
    before = shutil.disk_usage("/dev/shm").free
    ff.fold(lambda p: p, x, ff.Sum(), on="cpu:2")
    assert before - shutil.disk_usage("/dev/shm").free < x.nbytes / 2
