"""Long texts in parts: how they are cut, and how the vectors of a text's parts become one again."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fanfold.errors import PlanError, RequestError
from fanfold.merge import Mean, Weighted, fold
from fanfold.tasks.task import Prepared

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

MERGES = ("mean",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """Parts of at most `tokens` tokens, special tokens and prompt included.

    Each part begins with the last `overlap` tokens of the text in the part before. With `merge` the parts of a
    text become one result.
    """

    tokens: int
    overlap: int = 0
    merge: Literal["mean"] | None = None

    @property
    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shown(self) -> str:
        overlap = f", {self.overlap} of them from the part before" if self.overlap else ""
        then = f"; one vector a text: the {self.merge} over its parts" if self.merge else ""
        return f"parts of at most {self.tokens} tokens{overlap}{then}"


def make_chunking(
    chunk: int | None, overlap: int | None, merge: str | None, *, context: int | None, shown: str
) -> Chunking | None:
    """What --chunk, --overlap and --merge ask for; `context` is the most tokens the model takes, None: no limit."""
    if chunk is None:
        if overlap is not None or merge is not None:
            raise RequestError(
                f"--overlap {overlap}" if overlap is not None else f"--merge {merge}",
                found="no --chunk",
                allowed="together with --chunk TOKENS",
                do="add --chunk, or leave it away",
            )
        return None
    if chunk < 3 or (context is not None and chunk > context):
        raise PlanError(
            f"--chunk {chunk}",
            found=f"{shown} takes {context or 'any number of'} tokens",
            allowed=f"3 to {context or 'any number of'} tokens",
            do=f"use --chunk {min(context, 256) if context else 256}",
        )
    if overlap is not None and not 0 <= overlap < chunk:
        raise PlanError(
            f"--overlap {overlap}",
            found=f"--chunk {chunk}",
            allowed=f"0 to {chunk - 1}: a part must go on behind the one before",
            do=f"use --overlap {chunk // 8}",
        )
    if merge not in (None, *MERGES):
        raise RequestError(
            f"--merge {merge}", found="no such merge", allowed=", ".join(MERGES), do="leave it away for a row per part"
        )
    return Chunking(tokens=chunk, overlap=overlap or 0, merge=merge)  # type: ignore[arg-type]


def spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Where the parts of `length` tokens begin and end: all `size` long, each `overlap` into the one before.

    >>> spans(10, 4, 1)
    [(0, 4), (3, 7), (6, 10)]
    """
    found = [(0, min(size, length))]
    while found[-1][1] < length:
        start = found[-1][1] - overlap
        found.append((start, min(start + size, length)))
    return found


def cut_row(row: np.ndarray, chunking: Chunking, *, head: int, tail: int) -> list[np.ndarray]:
    """Token ids of a text as parts; each has the first `head` (start, prompt) and last `tail` tokens of the whole.

    A text that fits stays as it is. PlanError where head, tail and overlap leave no room.
    """
    import numpy as np

    if len(row) <= chunking.tokens:
        return [row]
    size = chunking.tokens - head - tail
    if size <= chunking.overlap:
        raise PlanError(
            f"--chunk {chunking.tokens} --overlap {chunking.overlap}",
            found=f"{head + tail} tokens of each part are special tokens and prompt, {max(0, size)} are left",
            allowed="an overlap smaller than what is left",
            do=f"use --chunk {chunking.overlap + head + tail + 32}, or a smaller overlap",
        )
    body = row[head : len(row) - tail]
    ends = (row[:head], row[len(row) - tail :])
    return [
        np.concatenate([ends[0], body[start:stop], ends[1]]) for start, stop in spans(len(body), size, chunking.overlap)
    ]


def prepared_parts(rows: Iterable[np.ndarray], chunking: Chunking, *, head: int, tail: int) -> Prepared:
    """Whole texts as token ids -> all their parts, as a task's `prepare` returns them."""
    cut = [cut_row(row, chunking, head=head, tail=tail) for row in rows]
    return Prepared(ids=[part for parts in cut for part in parts], truncated=[], parts=[*map(len, cut)])


def mean_of_parts(vectors: np.ndarray, tokens: Sequence[int], *, normalize: bool) -> np.ndarray:
    """float32 [n, D] and the parts' numbers of tokens, the weights -> float32 [D]. One part stays as it is."""
    import numpy as np

    if len(vectors) == 1:
        only: np.ndarray = vectors[0]
        return only
    merge = Mean()
    parts = (
        merge.lift(Weighted(vector.astype(np.float64), count), 1) for vector, count in zip(vectors, tokens, strict=True)
    )
    mean = merge.finish(fold(merge, parts))
    if normalize:
        mean = mean / max(math.sqrt(math.fsum(mean * mean)), 1e-12)
    merged: np.ndarray = mean.astype(np.float32)
    return merged
