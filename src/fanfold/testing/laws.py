"""The laws of a merge as tests to run on any merge: yours too.

    from fanfold.testing.laws import check_all, within

    def test_my_merge_keeps_the_laws():
        check_all(MyMerge(), [(1.5, 3), (2.5, 1), (0.5, 4)], equal=within(rtol=1e-15))

One function per law; each takes the merge, the pieces as (value, rows) and the equality of two results, so
that an approximate merge states its tolerance. A law that does not hold raises DifferenceFound with both
results. The idea is that of algebird's BaseProperties.scala.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fanfold.errors import DataError, DifferenceFound
from fanfold.merge import codec
from fanfold.merge.merge import OrderedFold, fold

if TYPE_CHECKING:
    from fanfold.merge.merge import Merge

Pieces = Sequence[tuple[Any, int]]  # what was computed from each piece, and its rows, in piece order
Equal = Callable[[Any, Any], bool]

_NUM_DRAWS = 10  # of cuts and of arrival orders; seeded, so a failure comes back


def associativity(merge: Merge[Any, Any], pieces: Pieces, equal: Equal) -> None:
    """join(join(a, b), c) equals join(a, join(b, c)), for neighbours and for the longest chains."""
    parts = _lift_all(merge, pieces)
    for a, b, c in zip(parts, parts[1:], parts[2:], strict=False):
        left, right = merge.join(merge.join(a, b), c), merge.join(a, merge.join(b, c))
        _same(merge, "associativity", left, right, equal)
    if parts:
        left, right = parts[0], parts[-1]
        for part in parts[1:]:
            left = merge.join(left, part)
        for part in parts[-2::-1]:
            right = merge.join(part, right)
        _same(merge, "associativity of chains", left, right, equal)


def identity(merge: Merge[Any, Any], pieces: Pieces, equal: Equal) -> None:
    """empty() joined on either side changes nothing, for each part, the whole, and empty() itself."""
    parts = _lift_all(merge, pieces)
    for part in [*parts, fold(merge, parts), merge.empty()]:
        _same(merge, "identity on the left", part, merge.join(merge.empty(), part), equal)
        _same(merge, "identity on the right", part, merge.join(part, merge.empty()), equal)


def any_split(merge: Merge[Any, Any], pieces: Pieces, equal: Equal) -> None:
    """However the pieces are dealt to units in consecutive runs, the folds of the runs fold to the whole."""
    parts = _lift_all(merge, pieces)
    whole = fold(merge, parts)
    draw = random.Random(0)
    for _ in range(_NUM_DRAWS):
        cuts = sorted(draw.choices(range(len(parts) + 1), k=draw.randint(1, 4)))
        starts, stops = [0, *cuts], [*cuts, len(parts)]  # runs may be empty: a unit that got no pieces
        runs = [fold(merge, parts[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        _same(merge, f"any split, cut at {cuts}", whole, fold(merge, runs), equal)


def empty_pieces(merge: Merge[Any, Any], pieces: Pieces, equal: Equal) -> None:
    """Pieces of no rows among others, and empty parts between them, change nothing."""
    parts = _lift_all(merge, pieces)
    whole = fold(merge, parts)
    spaced = [part for pair in zip(parts, (merge.empty() for _ in parts), strict=True) for part in pair]
    _same(merge, "empty parts", whole, fold(merge, [merge.empty(), *spaced]), equal)
    full = [merge.lift(value, rows) for value, rows in pieces if rows]
    if full:
        _same(merge, "pieces of no rows", whole, fold(merge, full), equal)


def arrival_order(merge: Merge[Any, Any], pieces: Pieces, equal: Equal) -> None:
    """In whatever order the parts arrive, OrderedFold gives the bits of the fold in order."""
    parts = _lift_all(merge, pieces)
    in_order = fold(merge, parts)
    draw = random.Random(0)
    order = list(range(len(parts)))
    for turn in range(_NUM_DRAWS):
        if turn:  # the first turn is last to first
            draw.shuffle(order)
        else:
            order.reverse()
        ordered = OrderedFold(merge)
        for index in order:
            ordered.add(index, parts[index])
        arrived = ordered.part(len(parts))
        if _bits(arrived) != _bits(in_order):
            _broken(merge, f"same bits for arrival order {order}", in_order, arrived)


def save_load(merge: Merge[Any, Any], pieces: Pieces, equal: Equal) -> None:
    """A part that was pickled, or saved by `fanfold.merge.codec`, and loaded gives the same result, alone and joined.

    What the codec loaded is the part bit for bit: saved again, it gives the same bytes. Raises DataError for a part
    that the codec cannot save; a merge with such parts can keep the other laws, one by one.
    """
    parts = _lift_all(merge, pieces)
    for name, way in (("pickle", _pickled), ("codec", _coded)):
        loaded = [way(part) for part in parts]
        for part, again in zip([*parts, fold(merge, parts)], [*loaded, fold(merge, loaded)], strict=True):
            _same(merge, f"save and load by {name}", part, again, equal)
        _same(merge, f"save and load of empty by {name}", merge.empty(), way(merge.empty()), equal)
    for part in [*parts, fold(merge, parts), merge.empty()]:
        if codec.save(_coded(part)) != codec.save(part):
            _broken(merge, "same bits after save and load", part, _coded(part))


def joins_change_nothing(merge: Merge[Any, Any], pieces: Pieces, equal: Equal) -> None:
    """Joining and finishing leave the parts as they were."""
    parts = _lift_all(merge, pieces)
    before = [(_bits(part), repr(part)) for part in parts]
    _outcome(merge, fold(merge, parts))
    _outcome(merge, fold(merge, parts[::-1]))
    for index, part in enumerate(parts):
        _outcome(merge, part)
        if _bits(part) != before[index][0]:
            _broken(merge, f"parts stay as they are, part {index}", before[index][1], repr(part))


LAWS = (associativity, identity, any_split, empty_pieces, arrival_order, save_load, joins_change_nothing)


def check_all(merge: Merge[Any, Any], values: Pieces, equal: Equal | None = None) -> None:
    """Every law holds for the merge on these pieces, or DifferenceFound is raised. `exactly` by default."""
    for law in LAWS:
        law(merge, values, equal or exactly)


def exactly(left: Any, right: Any) -> bool:
    """Same type, same values, same dtype and shape; NaN equals NaN; dataclasses and dicts item by item."""
    if type(left) is not type(right):
        return False
    if hasattr(left, "dtype"):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        same = (left == right) | ((left != left) & (right != right))
        return bool(same.all() if hasattr(same, "all") else same)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(exactly, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(map(exactly, left.values(), right.values()))
    if is_dataclass(left):
        return all(exactly(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    if hasattr(left, "equals"):  # Arrow
        return bool(left.equals(right))
    return bool(left == right or (left != left and right != right))


def within(*, rtol: float, atol: float = 0.0) -> Equal:
    """Equality of numbers, or of arrays element by element: |a - b| <= atol + rtol * max(|a|, |b|)."""

    def close(left: Any, right: Any) -> bool:
        if exactly(left, right):
            return True
        if getattr(left, "dtype", None) != getattr(right, "dtype", None) or _shape(left) != _shape(right):
            return False
        if _shape(left):
            return all(map(close, left.reshape(-1).tolist(), right.reshape(-1).tolist()))
        return bool(abs(left - right) <= atol + rtol * max(abs(left), abs(right)) < float("inf"))

    return close


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _bits(part: Any) -> bytes:
    """All bits of the part; by pickle, which tells equal tensors apart, only where the codec cannot save it."""
    try:
        return codec.save(part)
    except DataError:
        return pickle.dumps(part)


def _pickled(part: Any) -> Any:
    return pickle.loads(pickle.dumps(part))


def _coded(part: Any) -> Any:
    return codec.load(codec.save(part))


def _lift_all(merge: Merge[Any, Any], pieces: Pieces) -> list[Any]:
    return [merge.lift(value, rows) for value, rows in pieces]


def _outcome(merge: Merge[Any, Any], part: Any) -> Any:
    """The result, or the DataError class where no pieces have no result."""
    try:
        return merge.finish(part)
    except DataError as error:
        return type(error)


def _same(merge: Merge[Any, Any], law: str, left: Any, right: Any, equal: Equal) -> None:
    expected, found = _outcome(merge, left), _outcome(merge, right)
    refused = [isinstance(outcome, type) for outcome in (expected, found)]
    if expected is not found if any(refused) else not equal(expected, found):
        _broken(merge, law, expected, found)


def _broken(merge: Merge[Any, Any], law: str, expected: Any, found: Any) -> NoReturn:
    raise DifferenceFound(
        f"keep the law of {law}: {merge!r}",
        found=f"{found!r:.500}",
        allowed=f"{expected!r:.500}",
        do="repair the merge, or state the tolerance it has by the equality passed in",
    )
