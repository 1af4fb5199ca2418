"""What the ranks of test_shared.py do: python shared_ranks.py PROGRAM PATH RANK SIZE [TIMEOUT_S]."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time

import numpy as np

from fanfold.errors import FanfoldError
from fanfold.parallel.shared import SharedGroup
from fanfold.parallel.shared_file import SLOT_BYTES

DTYPES = ["f4", "f8", "f2", "c8", "c16", "i1", "u2", "i4", "i8", "u8", ">f4"]
CHUNK = SLOT_BYTES // 8
COUNTS = [0, 1, 7, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def drawn(rank, turn, shape, dtype="f8"):
    """The array that a rank has in a turn: every rank can draw every other's."""
    numbers = np.random.default_rng([rank, turn]).normal(size=shape) * 100
    if np.dtype(dtype).kind == "u":
        numbers = np.abs(numbers)
    if np.dtype(dtype).kind == "c":
        numbers = numbers + 1j * numbers[..., ::-1] if numbers.ndim else numbers * 1j
    return np.asarray(numbers).astype(dtype)


def same(found, expected):
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.tobytes() == expected.tobytes()


def sums(group):
    """Every dtype and many sizes, against the sum in rank order made here; the hash of all results."""
    digest = hashlib.sha256()
    cases = [(dtype, (1000,)) for dtype in DTYPES] + [("f8", (count,)) for count in COUNTS]
    cases += [("f4", ()), ("f4", (3, 0, 2)), ("f4", (5, 7, 11)), ("c16", (SLOT_BYTES // 16 + 3,))]
    for turn, (dtype, shape) in enumerate(cases):
        all_ranks = [drawn(rank, turn, shape, dtype) for rank in range(group.size)]
        expected = all_ranks[0].copy()
        for one in all_ranks[1:]:
            expected = (expected + one).astype(dtype)
        mine = all_ranks[group.rank]
        found = group.all_reduce(mine, f"turn {turn}")
        assert found is mine
        same(found, expected)
        digest.update(found.tobytes())
    whole = np.zeros((6, 8))
    whole[::2, 1::3] = 1 + group.rank
    group.all_reduce(whole[::2, 1::3], "every other row")  # in place in an array that is not contiguous
    assert whole.sum() == 9 * sum(range(1, group.size + 1))
    odd = np.array([0x7FF80000000000 << 8 | 1 + group.rank, 0x7FF0 << 48], np.uint64).view(np.float64)
    digest.update(group.all_reduce(odd, "NaNs of different bits").tobytes())
    return digest.hexdigest()


def gathers(group):
    """Ragged gathers, empty shares, broadcasts from every rank."""
    for turn, width in enumerate((1, 3, CHUNK // 2 + 1)):
        shapes = [((rank + turn) % 3, width) for rank in range(group.size)]
        mine = drawn(group.rank, turn, shapes[group.rank])
        found = group.all_gather(mine, "ragged")
        for rank, shape in enumerate(shapes):
            same(found[rank], drawn(rank, turn, shape))
        found[group.rank][...] = -1
        same(mine, drawn(group.rank, turn, shapes[group.rank]))  # what was gathered is a copy
    same(group.all_gather(np.array([True, group.rank > 0]), "flags")[-1], np.array([True, group.size > 1]))
    for root in range(group.size):
        for shape in ((), (0, 4), (3, CHUNK)):
            array = drawn(group.rank, root, shape)
            same(group.broadcast(array, root, "from one"), drawn(root, root, shape))
    view = np.zeros((4, 4), np.int32) + group.rank
    group.broadcast(view.T[1:3], 0, "columns")
    assert view[:, 1:3].sum() == 0
    assert view[:, 0].sum() == 4 * group.rank
    return "gathered"


def exchanged(group):
    """Each rank to each, shares of different sizes, empty ones too."""
    for turn in range(3):
        sizes = [[(turn * 5 + 3 * source + to) % 4 * 100 for to in range(group.size)] for source in range(group.size)]
        mine = [drawn(group.rank, to, (sizes[group.rank][to],)) for to in range(group.size)]
        found = group.all_to_all(mine, sizes, "tokens")
        for source in range(group.size):
            same(found[source], drawn(source, group.rank, (sizes[source][group.rank],)))
    for turn, step in enumerate((1, 5, CHUNK // 2 + 1)):
        sizes = [[(2 * frm + to + turn) % 3 * step for to in range(group.size)] for frm in range(group.size)]
        mine = [drawn(group.rank, 10 * turn + to, (count,)) for to, count in enumerate(sizes[group.rank])]
        found = group.all_to_all(mine, sizes, "uneven")
        for frm, given in enumerate(sizes):
            same(found[frm], drawn(frm, 10 * turn + group.rank, (given[group.rank],)))
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sizes = [[7 + frm if to == (frm + 1) % group.size else 0 for to in range(group.size)] for frm in range(group.size)]
    mine = [drawn(group.rank, to, (count,)) for to, count in enumerate(sizes[group.rank])]
    same(group.all_to_all(mine, sizes, "round")[left], drawn(left, group.rank, (7 + left,)))
    assert mine[right].size == 7 + group.rank
    return "exchanged"


def messages(group):
    """Around the ring and to all, larger and smaller than a channel; messages overtake nothing."""
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for turn, shape in enumerate([(), (0,), (2, 3), (CHUNK, 1), (9, CHUNK - 1)]):
        mine, expected = drawn(group.rank, turn, shape), drawn(left, turn, shape)
        if group.rank == 0:
            group.send(mine, right, f"turn {turn}")
            same(group.recv(left, f"turn {turn}"), expected)
        else:
            same(group.recv(left, f"turn {turn}"), expected)
            group.send(mine, right, f"turn {turn}")
    for number in range(4):  # as many as wait for nobody: all ranks send first
        group.send(np.full(number, group.rank, np.int16), right, f"number {number}")
    for number in range(4):
        same(group.recv(left, f"number {number}"), np.full(number, left, np.int16))
    group.send(np.asfortranarray(drawn(group.rank, 9, (3, 5))), right, "columns first")
    same(group.recv(left, "columns first"), drawn(left, 9, (3, 5)))
    return "sent"


def hurried(group):
    """Many short rounds with ranks out of step, messages in between: nobody reads what is not meant for the round."""
    rng = random.Random(group.rank)
    for turn in range(1500):
        pause = rng.random()
        if pause < 0.01:
            time.sleep(pause / 10)
        elif pause < 0.3:
            time.sleep(0)
        found = group.all_reduce(np.full(64, (turn + 1) * 10**group.rank), "step")
        assert (found == (turn + 1) * sum(10**rank for rank in range(group.size))).all(), (turn, found)
        if turn % 7 == 0:
            right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
            group.send(np.array([turn]), right, "turn")
            assert group.recv(left, "turn") == [turn]
    return group.calls((group.rank + 1) % group.size)[-1].split("#")[0]


def everything(group):
    return [sums(group), gathers(group), exchanged(group), messages(group), hurried(group)]


def steps(group, count=3):
    for layer in range(count):
        group.all_reduce(np.zeros((1, 8), np.float32), f"layers.{layer}.mlp.down")


def killed(group):
    steps(group)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    steps(group)


def killed_in_a_call(group):
    """Rank 1 dies in the middle of a call: while the others still miss the last rank's share."""
    steps(group)
    if group.rank == 1:
        signal.setitimer(signal.ITIMER_REAL, 0.3)  # SIGALRM's default is to end the process
    if group.rank == group.size - 1:
        time.sleep(30)
    steps(group, 1)


def stopped(group):
    steps(group)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    steps(group)


def asleep(group):
    steps(group)
    if group.rank == 1:
        time.sleep(30)
    steps(group)


def steps_with_a_late_rank(group):
    if group.rank == 1:
        group.timeout_s = 20.0
        time.sleep(0.7)
    steps(group)


def receives_nothing(group):
    steps(group)
    if group.rank == 0:
        group.recv(1, "hidden states of stage 0")
    time.sleep(30)


def both_send(group):
    """More than a channel holds, to each other at once."""
    group.timeout_s += 10 * group.rank
    group.send(np.zeros(6 * CHUNK), 1 - group.rank, "keys and values")


def for_ever(group):
    while True:
        steps(group)
        right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        group.send(np.zeros(100), right, "stage")
        group.recv(left, "stage")
        group.all_gather(np.zeros((group.rank, CHUNK)), "heads")


def raises(group):
    steps(group)
    if group.rank == 1:
        raise ValueError("a bad weight")
    steps(group)


def leaves(group):
    steps(group)
    if group.rank == 0:
        group.send(np.arange(3), 1, "last words")
    if group.rank != 1:
        group.close()
        return "left"
    assert group.recv(0, "last words").sum() == 3  # what was sent before the end arrives
    steps(group)


def other_name(group):
    steps(group)
    group.all_reduce(np.zeros(4), "layers.3.attention" if group.rank else "layers.3.mlp")


def other_dtype(group):
    steps(group)
    group.all_reduce(np.zeros(4, "f4" if group.rank else "f8"), "layers.3.mlp")


def other_shape(group):
    steps(group)
    group.all_reduce(np.zeros((4, 2) if group.rank else (2, 4)), "layers.3.mlp")


def other_kind(group):
    steps(group)
    (group.all_reduce if group.rank else group.all_gather)(np.zeros(4), "layers.3.mlp")


def other_message(group):
    steps(group)
    if group.rank == 0:
        group.send(np.zeros(4), 1, "layers.3")
        group.send(np.zeros((8, SLOT_BYTES)), 1, "waits for its receiver")
    else:
        group.recv(0, "layers.4")


def forgets_one(group):
    """A rank leaves one of two equal calls out: the next call is another one."""
    steps(group)
    if group.rank == 0:
        group.all_reduce(np.zeros(4), "layers.3.mlp")
    group.all_reduce(np.zeros(4), "layers.3.mlp")
    group.barrier("end")


def waits(group):
    steps(group)
    time.sleep(30)


def exchanges(group):
    return [sums(group), gathers(group), exchanged(group), messages(group)]


def main(program, path, rank, size, timeout_s="20"):
    transport = SharedGroup
    if path.endswith("gloo"):
        from fanfold.parallel.gloo import GlooGroup as transport  # it imports torch, which takes seconds
    try:
        with transport(path, int(rank), int(size), float(timeout_s)) as group:
            print("joined", flush=True)
            result = globals()[program](group)
    except (FanfoldError, ValueError) as error:
        parts = {part: getattr(error, part, "") for part in ("asked", "found", "do")}
        print(json.dumps({"error": type(error).__name__, "text": str(error), **parts}))
        return 1
    print(json.dumps({"result": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
