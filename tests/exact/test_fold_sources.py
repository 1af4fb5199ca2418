"""What `fold` and `map` take besides data in memory: iterators, files and globs, .npy files, tensors in processes."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fanfold as ff
from fanfold.data.pieces import pieces_of
from fanfold.data.streams import StreamRows
from fanfold.engine.engine import Desk
from fanfold.errors import DataError, InputError, PieceFailed, PlanError
from fanfold.job.lending import Lending
from fanfold.job.piecework import PieceWork, add_block
from fanfold.merge.merge import OrderedFold
from fanfold.plan.plan import Unit

PROCESSES = pytest.mark.slow
WHERE = ["inline", "threads:2", pytest.param("cpu:2", marks=PROCESSES), pytest.param("auto", marks=PROCESSES)]


@pytest.fixture(scope="module", autouse=True)
def workers_end():
    yield
    ff.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    records = [json.dumps({"i": i, "text": f"row {i}"}) + "\n" for i in range(5000)]
    (folder / "a.jsonl").write_text("".join(records[:4000]))
    (folder / "b.jsonl").write_text("".join(records[4000:]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(records).encode()))
    (folder / "d.csv").write_text("i,text\n" + "".join(f'{i},"row, {i}"\n' for i in range(3000)))
    (folder / "e.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    table = pa.table({"i": np.arange(100_000), "x": np.linspace(0, 1, 100_000)})
    pq.write_table(table, folder / "f.parquet", row_group_size=30_000)
    np.save(folder / "g.npy", np.random.default_rng(0).standard_normal((70_000, 3)))
    return folder


def numbers(rows):
    return [int(row["i"]) for row in rows]


@pytest.mark.parametrize("on", WHERE)
@pytest.mark.parametrize(
    ("name", "count"), [("a.jsonl", 4000), ("*.jsonl", 5000), ("c.jsonl.gz", 5000), ("d.csv", 3000)]
)
def test_records_of_files_are_dicts_in_order(folder, name, count, on):
    assert ff.map(numbers, str(folder / name), on=on) == list(range(count))
    assert ff.fold(numbers, folder / name, ff.Sum(), on=on) == sum(range(count))


@pytest.mark.parametrize("on", WHERE)
def test_lines_are_strings_and_parquet_gives_tables(folder, on):
    assert ff.map(lambda lines: [line.upper() for line in lines], str(folder / "e.txt"), on=on)[2999] == "LINE 2999"
    table = pq.read_table(folder / "f.parquet")
    assert ff.map(lambda piece: piece.select(["x"]), folder / "f.parquet", on=on).equals(table.select(["x"]))
    whole = ff.fold(lambda piece: piece["x"], folder / "f.parquet", ff.Mean(), on="inline")
    assert ff.fold(lambda piece: piece["x"], folder / "f.parquet", ff.Mean(), on=on) == whole
    assert whole == pytest.approx(0.5, rel=1e-15)


@pytest.mark.parametrize("on", WHERE)
def test_an_npy_file_is_an_array(folder, on):
    array = np.load(folder / "g.npy")
    assert np.array_equal(ff.fold(np.exp, folder / "g.npy", ff.Sum(), on=on), ff.fold(np.exp, array, ff.Sum()))
    assert np.array_equal(ff.map(np.tanh, str(folder / "g.npy"), on=on), np.tanh(array))


@pytest.mark.parametrize("on", WHERE)
def test_pieces_of_an_iterator_depend_on_its_rows_alone(on):
    rows = np.random.default_rng(3).standard_normal(20_000).tolist()
    whole = ff.fold(np.exp, iter(rows), {"mean": ff.Mean(), "moments": ff.Moments()}, on="inline")
    assert ff.fold(np.exp, iter(rows), {"mean": ff.Mean(), "moments": ff.Moments()}, on=on) == whole
    assert list(ff.map(lambda piece: [v * 2 for v in piece], iter(rows), on=on)) == [v * 2 for v in rows]


@pytest.mark.parametrize("on", WHERE)
def test_an_iterator_without_end_is_mapped_as_far_as_asked(on):
    taken = []

    def count():
        for number in itertools.count():
            taken.append(number)
            yield number

    found = ff.map(lambda piece: [v * 2 for v in piece], count(), on=on)
    assert not taken
    assert list(itertools.islice(found, 1000)) == list(range(0, 2000, 2))
    found.close()
    assert len(taken) < 100_000


def test_a_folded_iterator_is_not_held_in_memory():
    held = []

    class Row:
        def __init__(self, number):
            self.number = number
            held.append(1)

        def __del__(self):
            held.pop()

    most = []

    def watch(piece):
        most.append(len(held))
        return [row.number for row in piece]

    assert ff.fold(watch, (Row(n) for n in range(50_000)), ff.Sum(), on="inline") == sum(range(50_000))
    assert max(most) < 50_000 / 5


@pytest.mark.torch
@pytest.mark.parametrize("on", ["inline", "threads:2", "cpu:2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_tensors_reach_processes_as_mapped_files(on, dtype):
    import torch

    x = (torch.arange(300_000) % 128).to(getattr(torch, dtype)).reshape(-1, 3)
    assert torch.equal(ff.map(lambda piece: piece * 2, x, on=on), x * 2)
    with pytest.raises(PieceFailed, match="piece"):
        ff.map(lambda piece: piece.mul_(2), x, on=on)
    if on == "cpu:2":  # in this process the error comes behind the write
        assert torch.equal(x, (torch.arange(300_000) % 128).to(x.dtype).reshape(-1, 3))


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["inline", "threads:2", pytest.param("cpu:2", marks=PROCESSES)])
def test_a_record_that_is_none_is_named_by_file_and_line(folder, tmp_path, on):
    (tmp_path / "bad.jsonl").write_text('{"i": 1}\n' * 700 + "{oops\n" + '{"i": 2}\n')
    with pytest.raises(DataError, match="row 700") as caught:
        ff.map(numbers, str(tmp_path / "bad.jsonl"), on=on)
    assert "bad.jsonl, line 701" in str(caught.value)
    assert "{oops" in str(caught.value)


def test_files_that_are_missing_or_of_no_kind_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="nothing"):
        ff.map(numbers, str(tmp_path / "nothing*.jsonl"))
    with pytest.raises(InputError, match=r"x\.npy"):
        ff.map(np.exp, tmp_path / "x.npy")
    (tmp_path / "pickled.npy").write_bytes(b"\x80\x04N.")
    with pytest.raises(InputError, match=r"pickled\.npy"):
        ff.map(np.exp, tmp_path / "pickled.npy")
    (tmp_path / "h.csv").write_text("i,other\n1,2\n")
    (tmp_path / "g.csv").write_text("i,text\n1,2\n")
    with pytest.raises(InputError, match="header"):
        ff.map(numbers, str(tmp_path / "*.csv"))


@pytest.mark.parametrize("x", [iter([1, 2, 3]), "a.jsonl"])
def test_a_number_of_pieces_is_refused_where_the_rows_are_not_known(x):
    with pytest.raises(PlanError, match="pieces=2"):
        ff.fold(lambda piece: piece, x, ff.Sum(), pieces=2)


def test_an_empty_iterator_and_an_empty_file(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    assert ff.fold(numbers, tmp_path / "none.jsonl", ff.Count()) == 0
    assert ff.fold(lambda piece: piece, iter([]), ff.Sum()) == 0
    assert list(ff.map(lambda piece: piece, iter([]))) == []
    with pytest.raises(DataError, match="take the mean"):
        ff.fold(lambda piece: piece, iter([]), ff.Mean())


def test_an_iterator_that_raises_raises_its_own_error():
    def broken():
        yield from range(1000)
        raise OSError("the line was cut")

    for on in ("inline", "threads:2"):
        with pytest.raises(OSError, match="the line was cut"):
            ff.fold(lambda piece: piece, broken(), ff.Sum(), on=on)


# -- the order in which pieces are completed ----------------------------------------------------------


def complete(stock, f, merge, seed):
    """The result where leases on eight units end in an order that a seed has drawn."""
    draw = random.Random(seed)
    done = OrderedFold(merge)
    agenda = Lending(stock, partial(add_block, done), 0, num_units=8)
    work = PieceWork(f=f, read=stock.read, merge=merge)
    desks = {number: Desk(Unit(name=f"unit:{number}")) for number in range(8)}
    busy = {}
    while not agenda.done or busy:
        for number, desk in desks.items():
            if number not in busy and draw.random() < 0.7 and (lease := agenda.next_for(desk.unit)) is not None:
                busy[number] = lease
        if busy:
            number = draw.choice(sorted(busy))
            lease = busy.pop(number)
            agenda.finished([(desks[number].unit, lease, work.carry_out(lease, desks[number]))])
    return merge.finish(done.part(stock.num_known))


@pytest.mark.parametrize("kind", ["array", "iterator"])
def test_twenty_random_orders_of_completion_give_the_same_bits(kind):
    x = np.random.default_rng(1).standard_normal(1_500_000)
    merge = ff.Record({"mean": ff.Mean(), "moments": ff.Moments(), "q": ff.Quantiles((0.5, 0.99)), "top": ff.TopK(5)})
    rows = x[:30_000].tolist()

    def stock():
        return pieces_of(x, None) if kind == "array" else StreamRows(iter(rows))

    def f(piece):
        return np.exp(-(np.asarray(piece) ** 2))

    whole = ff.fold(f, x if kind == "array" else iter(rows), merge, on="inline")
    for seed in range(20):
        found = complete(stock(), f, merge, seed)
        assert found["mean"] == whole["mean"]
        assert found["moments"] == whole["moments"]
        assert np.array_equal(found["q"], whole["q"])
        assert np.array_equal(found["top"].indices, whole["top"].indices)
