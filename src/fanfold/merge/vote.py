"""An ensemble's answer: the label most members vote for, or the mean of their probabilities.

The rows of a piece are members: values [members, ...]; a `Weighted` is the answer of one member with its weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fanfold.errors import DataError
from fanfold.merge.extremes import no_rows
from fanfold.merge.rows import per_row
from fanfold.merge.sums import Mean, MeanPart, Weighted


@dataclass(frozen=True, slots=True)
class VotePart:
    """labels [L] in order; weights [L, n] of the votes for each label on each of n items; labels None: no votes."""

    labels: Any = None
    weights: Any = None


@dataclass(frozen=True, slots=True)
class Vote:
    """For each item the label with the most votes, or the most weight; the smallest label of equals.

    Shapes: values [members, n] of ints or strings, or `Weighted(labels [n], w)` of one member -> labels [n].
    Exact for whole weights; other weights are added in piece order, in float64. No NaN: labels are ints, strings.
    """

    def empty(self) -> VotePart:
        """No votes."""
        return VotePart()

    def lift(self, value: Any, rows: int) -> VotePart:
        """The votes of a piece's members. Raises DataError for other shapes, labels or weights."""
        if not rows:
            return VotePart()
        import numpy as np

        weight = 1.0
        if isinstance(value, Weighted):
            value, weight = one_member(value, rows, "count votes")
        votes = np.asarray(per_row(value, rows, "count votes"))
        if votes.ndim != 2 or votes.dtype.kind not in "biuSU":
            raise DataError(
                "count votes",
                found=f"{votes.dtype} of shape {votes.shape}",
                allowed="labels [members, items], ints or strings",
                do="return one row of labels for each member, for example scores.argmax(-1)",
            )
        if not weight:
            return VotePart()
        labels = np.unique(votes)
        weights = (votes[None] == labels[:, None, None]).sum(axis=1) * weight
        return VotePart(labels, weights)

    def join(self, left: VotePart, right: VotePart) -> VotePart:
        """All votes. Raises DataError if the numbers of items or the kinds of labels differ."""
        if left.labels is None or right.labels is None:
            return right if left.labels is None else left
        import numpy as np

        kinds = ["text" if part.labels.dtype.kind in "SU" else "ints" for part in (left, right)]
        if kinds[0] != kinds[1] or left.weights.shape[1] != right.weights.shape[1]:
            raise DataError(
                "count votes",
                found=f"{kinds[0]} for {left.weights.shape[1]} item(s), then {kinds[1]} for {right.weights.shape[1]}",
                allowed="labels of one kind, for the same items, from all members",
                do="let every member label the same items",
            )
        labels = np.union1d(left.labels, right.labels)
        weights = np.zeros((len(labels), left.weights.shape[1]))
        weights[np.searchsorted(labels, left.labels)] += left.weights
        weights[np.searchsorted(labels, right.labels)] += right.weights
        return VotePart(labels, weights)

    def finish(self, part: VotePart) -> Any:
        """The labels. Raises DataError for no votes."""
        if part.labels is None:
            raise no_rows("count votes")
        return part.labels[part.weights.argmax(axis=0)]


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
        values = np.asarray(per_row(value, rows, "take the mean of probabilities"))
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
        return Mean().lift(Weighted(values[0], weight), 1)

    def join(self, left: MeanPart, right: MeanPart) -> MeanPart:
        """Of all members. Raises DataError if shapes differ."""
        return Mean().join(left, right)

    def finish(self, part: MeanPart) -> Any:
        """The probabilities. Raises DataError for no members."""
        return Mean().finish(part)


def one_member(value: Weighted, rows: int, asked: str) -> tuple[Any, float]:
    """A weighted answer as that of one row, and its weight. Raises DataError for several rows or a bad weight."""
    weight = value.w
    good = isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0
    if rows != 1 or not good:
        raise DataError(
            asked,
            found=f"the weight {weight!r:.60} for {rows} member(s)",
            allowed="Weighted(answer, w) for a piece of one member, w finite and 0 or above",
            do="cut into one piece for each member: pieces=len(members)",
        )
    import numpy as np

    return np.asarray(value.value)[None], float(weight)
