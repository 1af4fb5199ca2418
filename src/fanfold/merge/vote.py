"""An ensemble's answer: the label most members vote for, or the mean of their probabilities.

The rows of a piece are members: values [members, ...]; a `Weighted` is the answer of one member with its weight.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from fanfold.errors import DataError
from fanfold.merge.extremes import no_rows
from fanfold.merge.rows import numpy_rows
from fanfold.merge.sums import Mean, MeanPart, Weighted

_DIGIT_BITS = 32


@dataclass(frozen=True, slots=True)
class VotePart:
    """labels [L] in order, and the weight of the votes for each label on each of n items; labels None: no votes.

    Weights are exact: the sum over (place, digits [L, n] int64) of digits * 2^(32 place). Places rise; a digit may be
    larger than 2^32, since nothing is carried before the end.
    """

    labels: Any = None
    weights: tuple[tuple[int, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Vote:
    """For each item the label with the most votes, or the most weight; the smallest label of equals.

    Shapes: values [members, n] of ints or strings, or `Weighted(labels [n], w)` of one member -> labels [n].
    Exact, for any weights and up to 2^31 members: the order in which they come does not show. No NaN: labels are
    ints, strings. Memory: 8 L n bytes for L labels where all weights are whole and below 2^32; a few times that else.
    """

    def empty(self) -> VotePart:
        """No votes."""
        return VotePart()

    def lift(self, value: Any, rows: int) -> VotePart:
        """The votes of a piece's members. Raises DataError for other shapes, labels or weights."""
        if not rows:
            return VotePart()
        import numpy as np

        weight: float = 1
        if isinstance(value, Weighted):
            value, weight = one_member(value, rows, "count votes")
        votes = numpy_rows(value, rows, "count votes")
        if votes.ndim != 2 or votes.dtype.kind not in "biuSU":
            raise DataError(
                "count votes",
                found=f"{votes.dtype} of shape {votes.shape}",
                allowed="labels [members, items], ints or strings",
                do="return one row of labels for each member, for example scores.argmax(-1)",
            )
        if not weight:
            return VotePart()
        labels, places = np.unique(votes, return_inverse=True)
        shape = len(labels), votes.shape[1]
        cells = places.reshape(votes.shape) * shape[1] + np.arange(shape[1])
        counts = np.bincount(cells.reshape(-1), minlength=shape[0] * shape[1]).astype(np.int64).reshape(shape)
        return VotePart(labels, tuple((place, counts * digit) for place, digit in _digits(weight)))

    def join(self, left: VotePart, right: VotePart) -> VotePart:
        """All votes. Raises DataError if the numbers of items or the kinds of labels differ."""
        if left.labels is None or right.labels is None:
            return right if left.labels is None else left
        import numpy as np

        names = {"S": "bytes", "U": "text"}
        kinds = [names.get(part.labels.dtype.kind, "ints") for part in (left, right)]
        items = [part.weights[0][1].shape[1] for part in (left, right)]
        if kinds[0] != kinds[1] or items[0] != items[1]:
            raise DataError(
                "count votes",
                found=f"{kinds[0]} for {items[0]} item(s), then {kinds[1]} for {items[1]}",
                allowed="labels of one kind, for the same items, from all members",
                do="let every member label the same items",
            )
        labels = np.union1d(left.labels, right.labels)
        weights: dict[int, Any] = {}
        for part in (left, right):
            at = np.searchsorted(labels, part.labels)
            for place, digits in part.weights:
                if place not in weights:
                    weights[place] = np.zeros((len(labels), items[0]), np.int64)
                weights[place][at] += digits
        return VotePart(labels, tuple(sorted(weights.items())))

    def finish(self, part: VotePart) -> Any:
        """The labels. Raises DataError for no votes."""
        if part.labels is None:
            raise no_rows("count votes")
        import numpy as np

        best: Any = True
        for digits in reversed(_carried(dict(part.weights))):  # the highest place first
            among = np.where(best, digits, -1)
            best = among == among.max(axis=0)
        return part.labels[best.argmax(axis=0)]


@dataclass(frozen=True, slots=True)
class EnsembleMean:
    """The mean over members of their probabilities, weighted where members are `Weighted`.

    Shapes: values [members, ..., classes], or `Weighted([..., classes], w)` of one member -> [..., classes] float64.
    Error: that of `Mean`. Probabilities lie in 0 to 1 and add up to 1 within 1e-3 (NaN does not): else DataError.
    """

    def empty(self) -> MeanPart:
        """No members."""
        return MeanPart()

    def lift(self, value: Any, rows: int) -> MeanPart:
        """Of a piece's members. Raises DataError for what are no probabilities, or a bad weight."""
        if not rows:
            return MeanPart()
        import numpy as np

        weight = None
        if isinstance(value, Weighted):
            value, weight = one_member(value, rows, "take the mean of probabilities")
        values = numpy_rows(value, rows, "take the mean of probabilities")
        if values.ndim < 2 or values.dtype.kind not in "biuf":
            raise DataError(
                "take the mean of probabilities",
                found=f"{values.dtype} of shape {values.shape}",
                allowed="probabilities [members, ..., classes]",
                do="return a probability for each class",
            )
        values = values.astype(np.float64)
        good = ((values >= 0) & (values <= 1)).all(axis=-1) & (np.abs(values.sum(axis=-1) - 1) <= 1e-3)
        if not good.all():
            first = tuple(int(place) for place in np.argwhere(~good)[0])
            raise DataError(
                "take the mean of probabilities",
                found=f"{values[first].tolist()!r:.80} at {list(first)} of a piece",
                allowed="numbers from 0 to 1 that add up to 1",
                do="apply softmax to scores first",
            )
        if weight is None:
            return Mean().lift(values, rows)
        return Mean().lift(Weighted(values[0], float(weight)), 1)

    def join(self, left: MeanPart, right: MeanPart) -> MeanPart:
        """Of all members. Raises DataError if shapes differ."""
        return Mean().join(left, right)

    def finish(self, part: MeanPart) -> Any:
        """The probabilities. Raises DataError for no members."""
        return Mean().finish(part)


def one_member(value: Weighted, rows: int, asked: str) -> tuple[Any, float]:
    """A weighted answer as that of one row, and its weight. Raises DataError for several rows or a bad weight."""
    weight = value.w
    if getattr(weight, "shape", None) == () and hasattr(weight, "item"):  # a NumPy scalar, an array of no dimension
        weight = weight.item()
    good = isinstance(weight, (int, float)) and 0 <= weight <= sys.float_info.max
    if rows != 1 or not good:
        raise DataError(
            asked,
            found=f"the weight {weight!r:.60} for {rows} member(s)",
            allowed="Weighted(answer, w) for a piece of one member, w finite and 0 or above",
            do="cut into one piece for each member: pieces=len(members)",
        )
    import numpy as np

    return np.asarray(value.value)[None], weight


def _digits(weight: float) -> list[tuple[int, int]]:
    """The weight as (place, digit): the sum of digit * 2^(32 place) is exactly it. Places rise; none for 0."""
    whole, parts = weight.as_integer_ratio()  # parts is a power of two
    place = -((parts.bit_length() - 1 + _DIGIT_BITS - 1) // _DIGIT_BITS)
    whole = whole << (-place * _DIGIT_BITS) >> (parts.bit_length() - 1)
    found = []
    while whole:
        if whole % 2**_DIGIT_BITS:
            found.append((place, whole % 2**_DIGIT_BITS))
        whole, place = whole >> _DIGIT_BITS, place + 1
    return found


def _carried(weights: dict[int, Any]) -> list[Any]:
    """The digits of all places from the lowest up, each below 2^32 but for the last: comparable one by one."""
    digits, carry = [], 0
    for place in range(min(weights), max(weights) + 1):
        total = weights.get(place, 0) + carry
        digits.append(total & (2**_DIGIT_BITS - 1))
        carry = total >> _DIGIT_BITS
    return [*digits, carry]
