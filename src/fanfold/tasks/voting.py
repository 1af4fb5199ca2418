"""Several language models of one task: the answer that most of them give, the first model's of equals.

Each model has its own tokenizer; a row's ids are those of all models, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold.errors import RequestError
from fanfold.merge import Vote
from fanfold.tasks.task import BadRows, ModelBatch, Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fanfold.data.reading import Reading
    from fanfold.plan.numerics import Dtype, Numerics
    from fanfold.plan.plan import Unit
    from fanfold.tasks.completer import GenerateOnUnit
    from fanfold.tasks.generate import Generate
    from fanfold.tasks.task import Column

_NUMBERS = 3  # whole numbers that each model keeps beside its ids: how many they are, the limit, the row


def check_merge(models: int, merge: str | None) -> None:
    """RequestError where --merge does not fit the number of models."""
    if merge == "mean":
        raise RequestError(
            "--merge mean", found="answers, which have no mean", allowed="--merge vote", do="use --merge vote"
        )
    if merge not in (None, "vote") or (merge is None) != (models == 1):
        raise RequestError(
            f"{models} --model" + (f" with --merge {merge}" if merge else ""),
            found="no merge of several models" if merge is None else "no such merge, or nothing to merge",
            allowed="one --model, or several with --merge vote",
            do="add --merge vote" if merge is None else "name several models, or leave --merge away",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateVote:
    """The task with its members, all of the same settings."""

    members: tuple[Generate, ...]

    @property
    def first(self) -> Generate:
        return self.members[0]

    @property
    def name(self) -> str:
        return "generate"

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.first.columns

    def reading(self, column: str) -> Reading:
        return self.first.reading(column)

    @property
    def numerics(self) -> dict[str, Any]:
        return self.first.numerics

    @property
    def counted(self) -> tuple[str, ...]:
        return self.first.counted

    @property
    def unit_bytes(self) -> int:
        return sum(member.unit_bytes for member in self.members)

    @property
    def chunking(self) -> None:
        return None

    def merge_parts(self, values: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        return self.first.merge_parts(values, tokens)

    def compiled_for(self, numerics: Numerics) -> bool:
        return False

    def compile(self, numerics: Numerics) -> None:
        self.first.compile(numerics)

    @property
    def imports(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for member in self.members for name in member.imports))

    @property
    def key(self) -> str:
        return repr([member.key for member in self.members])

    @property
    def record(self) -> dict[str, Any]:
        return {"task": self.name, "merge": "vote", "members": [member.record for member in self.members]}

    @property
    def options(self) -> dict[str, Any]:
        return {**self.first.options, "merge": "vote"}

    @property
    def reference(self) -> list[str]:
        return [member.reference for member in self.members]

    @property
    def weights_bytes(self) -> int:
        return sum(member.weights_bytes for member in self.members)

    @property
    def flops_per_token(self) -> float:
        """Of a row's ids, which are those of all members: the mean over members."""
        return sum(member.flops_per_token for member in self.members) / len(self.members)

    @property
    def dtype(self) -> Dtype:
        return self.first.dtype

    @property
    def shown(self) -> dict[str, str]:
        models = ", ".join(member.shown["model"] for member in self.members)
        return {**self.first.shown, "model": models, "merge": "vote: the answer that most models give"}

    def open(self, unit: Unit, numerics: Numerics) -> VoteOnUnit:
        return VoteOnUnit([member.open(unit, numerics) for member in self.members], self.columns)


class VoteOnUnit:
    """All members on one unit."""

    def __init__(self, members: list[GenerateOnUnit], columns: tuple[Column, ...]) -> None:
        self._members, self._columns = members, columns

    def prepare(self, texts: Sequence[str], rows: Sequence[int]) -> Prepared:
        import numpy as np

        found = [member.prepare(texts, rows) for member in self._members]
        failures: dict[int, tuple[str, str]] = {}
        for prepared in reversed(found):
            failures |= prepared.failures
        places = range(len(texts))
        return Prepared(
            ids=[np.concatenate([prepared.ids[place] for prepared in found]) for place in places],
            truncated=sorted({place for prepared in found for place in prepared.truncated}),
            more=[tuple(n for prepared in found for n in (prepared.more or ())[place]) for place in places],
            costs=[sum((prepared.costs or ())[place] for prepared in found) for place in places],
            failures=failures,
        )

    def load(self) -> None:
        for member in self._members:
            member.load()

    def filler(self) -> np.ndarray:
        return self._members[0].filler()

    def compute(self, batch: ModelBatch) -> dict[str, Any]:
        """A row that has no answer of one model has none. Raises BadRows."""
        found: list[dict[str, Any]] = []
        failures: dict[int, tuple[str, str]] = {}
        for place, member in enumerate(self._members):
            own = self._share(batch, place)
            try:
                found.append(member.compute(own))
            except BadRows as bad:
                found.append(bad.results)
                failures = {**bad.failures, **failures}
        chosen = voted([results["generated_text"] for results in found])
        results = {
            column.name: [found[member][column.name][row] for row, member in enumerate(chosen)]
            for column in self._columns
        }
        if failures:
            raise BadRows(failures, results)
        return results

    def _share(self, batch: ModelBatch, place: int) -> ModelBatch:
        """What the member at `place` gets of each row."""
        ids = []
        for row, (own, more) in enumerate(zip(batch.ids, batch.more, strict=True)):
            lengths = more[::_NUMBERS]
            start = sum(lengths[:place])
            ids.append(own if row in batch.left_out else own[start : start + lengths[place]])
        more_of = [more[_NUMBERS * place : _NUMBERS * (place + 1)] for more in batch.more]
        return ModelBatch(ids=ids, length=batch.length, more=more_of, left_out=batch.left_out, alive=batch.alive)


def voted(texts: Sequence[Sequence[str]]) -> list[int]:
    """Texts [members][rows] -> for each row the first member that gives the answer with the most votes.

    >>> voted([["a", "a"], ["b", "b"], ["b", "c"]])
    [1, 0]
    """
    import numpy as np

    rows = [list(row) for row in zip(*texts, strict=True)]
    if not rows:
        return []
    labels = np.array([[row.index(text) for text in row] for row in rows]).T  # [members, rows]
    merge = Vote()
    return [int(member) for member in merge.finish(merge.lift(labels, len(texts)))]
