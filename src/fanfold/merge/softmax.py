"""Values weighted by the softmax of scores whose keys were cut into pieces: the merge of split attention.

Shapes: scores [..., Q, K], values [..., K, D]; Q queries, K keys of the piece, D width; leading axes the same.
A part keeps the largest score, the sum of exp(score - largest) and the values weighted by these, so nothing
overflows, whatever the scores are. Array-generic: NumPy and torch; nothing is changed in place, so gradients flow.

Error: exp of a difference of scores of magnitude S is off by about u S, so with u the unit roundoff the result
is within about  u (2 S + K + 8) max|value|  of the exact one, on any cut (tested to 1e-13 in float64, 1e-5 in
float32). A score of -inf (a masked key) weighs nothing; a query with no key left gives 0. NaN and +inf
propagate as NaN. Source: Milakov & Gimelshein 2018, section 3.1; Dao et al. 2022, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fanfold.errors import DataError


@dataclass(frozen=True, slots=True)
class SoftmaxPart:
    """peak [..., Q, 1], weight [..., Q, 1], value [..., Q, D], not divided by the weight yet; None: no keys."""

    peak: Any = None
    weight: Any = None
    value: Any = None

    @classmethod
    def of(cls, output: Any, lse: Any) -> SoftmaxPart:
        """From what an attention kernel gives: output [..., Q, D] and log-sum-exp [..., Q].

        Where lse is -inf all keys were masked: the output there, which kernels leave NaN or 0, weighs nothing.
        """
        peak = lse[..., None]
        return cls(peak, _exp(peak - _safe(peak)), _zero_where(peak == float("-inf"), output))


@dataclass(frozen=True, slots=True)
class SoftmaxParts:
    """Attention over all keys, from pieces of keys. Error bound, masks, NaN policy and source: see the module.

    >>> import numpy as np
    >>> merge = SoftmaxParts()
    >>> left = merge.lift((np.zeros((1, 1)), np.array([[1.0]])), 1)
    >>> right = merge.lift((np.zeros((1, 3)), np.array([[5.0]] * 3)), 3)
    >>> merge.finish(merge.join(left, right)).tolist()
    [[4.0]]
    """

    def empty(self) -> SoftmaxPart:
        """No keys."""
        return SoftmaxPart()

    def lift(self, value: Any, rows: int) -> SoftmaxPart:
        """The part of a piece of keys: `(scores, values)`, or a SoftmaxPart. DataError where shapes do not fit."""
        if not rows:
            return SoftmaxPart()
        if isinstance(value, SoftmaxPart):
            return value
        scores, values = _pair(value, rows)
        peak = scores.amax(-1)[..., None] if hasattr(scores, "amax") else scores.max(axis=-1)[..., None]
        weights = _exp(scores - _safe(peak))
        return SoftmaxPart(peak, weights.sum(-1)[..., None], weights @ values)

    def join(self, left: SoftmaxPart, right: SoftmaxPart) -> SoftmaxPart:
        """As if the keys of both had been seen together. DataError if queries, width or dtype differ."""
        if left.peak is None or right.peak is None:
            return right if left.peak is None else left
        if left.value.shape != right.value.shape or left.value.dtype != right.value.dtype:
            raise DataError(
                "merge attention over pieces of keys",
                found=f"{_words(left.value)}, then {_words(right.value)}",
                allowed="the same queries, width and dtype for all pieces",
                do="cut the keys and values only, and give every piece all queries",
            )
        peak = left.peak.maximum(right.peak) if hasattr(left.peak, "maximum") else _maximum(left.peak, right.peak)
        safe = _safe(peak)
        scale_left, scale_right = _exp(left.peak - safe), _exp(right.peak - safe)
        return SoftmaxPart(
            peak,
            left.weight * scale_left + right.weight * scale_right,
            left.value * scale_left + right.value * scale_right,
        )

    def finish(self, part: SoftmaxPart) -> Any:
        """Attention [..., Q, D]; 0 where all keys were masked. Raises DataError for no keys at all."""
        if part.peak is None:
            raise DataError(
                "attend to keys",
                found="no keys",
                allowed="at least one key; it may be masked",
                do="check that the keys are not empty",
            )
        return part.value / (part.weight + (part.weight == 0))

    def lse(self, part: SoftmaxPart) -> Any:
        """The logarithm of the sum of exp(score) over all keys, [..., Q]; -inf where all were masked."""
        weight = part.weight
        if hasattr(weight, "log"):
            return (part.peak + weight.log())[..., 0]
        import numpy as np

        with np.errstate(divide="ignore"):
            return (part.peak + np.log(weight))[..., 0]


def _pair(value: Any, rows: int) -> tuple[Any, Any]:
    ok = isinstance(value, (tuple, list)) and len(value) == 2 and all(hasattr(array, "shape") for array in value)
    if ok:
        scores, values = value
        ok = len(scores.shape) >= 2 and len(values.shape) >= 2 and scores.shape[-1] == values.shape[-2] == rows
        if ok and "float" in str(scores.dtype) and scores.dtype == values.dtype:
            return scores, values
    found = [_words(array) if hasattr(array, "shape") else type(array).__name__ for array in value] if ok else None
    if found is None:
        many = isinstance(value, (tuple, list))
        found = [_words(a) if hasattr(a, "shape") else type(a).__name__ for a in (value if many else [value])][:4]
    raise DataError(
        "weigh values by the softmax of scores",
        found=f"a piece of {rows} key(s) gave " + ", ".join(found),
        allowed="(scores [..., Q, keys], values [..., keys, D]), float arrays of one dtype, or a SoftmaxPart",
        do="return the scores of all queries against the piece's keys, and the piece's values",
    )


def _words(array: Any) -> str:
    return f"{str(array.dtype).rpartition('.')[2]} {list(array.shape)}"


def _safe(peak: Any) -> Any:
    """The peak, 0 where no key counts: -inf less -inf would be NaN."""
    return _zero_where(peak == float("-inf"), peak)


def _zero_where(masked: Any, array: Any) -> Any:
    if hasattr(array, "masked_fill"):
        return array.masked_fill(masked, 0.0)
    import numpy as np

    return np.where(masked, array.dtype.type(0), array)


def _maximum(left: Any, right: Any) -> Any:
    import numpy as np

    return np.maximum(left, right)


def _exp(array: Any) -> Any:
    if hasattr(array, "exp"):
        return array.exp()
    import numpy as np

    with np.errstate(invalid="ignore", under="ignore"):
        return np.exp(array)
