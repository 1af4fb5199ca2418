"""Classify on one unit: texts to the sequences that models read, and their outputs to labels, scores, entities.

A row holds one sequence of token ids for each model and, with labels of the user's own, for each label; they stand
one behind the other in the row's ids, and `more` has their lengths.
Shapes: B rows, H sequences of a row for one model, L padded length, C outputs.
"""

from __future__ import annotations

import json
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError, cause_line
from fanfold.tasks.classifier import Classifier
from fanfold.tasks.task import Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fanfold.tasks.classify import Classify
    from fanfold.tasks.task import ModelBatch

_BEHIND = 1000  # characters kept behind the last token: words end by then
_EMPTY = ("EmptyText", "the model's tokenizer makes no token of it")


class ClassifyOnUnit:
    """The task on one unit."""

    def __init__(self, task: Classify, device: str, batch_tokens: int) -> None:
        self.task = task
        self.batch_tokens = batch_tokens
        self.models = [Classifier(member, device, task.dtype, task.split) for member in task.members]
        self.hypotheses = [task.template.format(label) for label in task.candidates]

    def prepare(self, texts: Sequence[str], rows: Sequence[int] = ()) -> Prepared:
        """Texts, or JSON objects of two columns -> the sequences of each row."""
        import numpy as np

        failures: dict[int, tuple[str, str]] = {}
        firsts, seconds = list(texts), None
        if self.task.pair is not None:
            firsts, seconds = _pairs(texts, self.task.pair, failures)
        sequences: list[list[np.ndarray]] = [[] for _ in texts]
        costs = [0] * len(texts)
        truncated: set[int] = set()
        for model in self.models:
            of_model: list[list[np.ndarray]] = [[] for _ in texts]
            for second in self._seconds(firsts, seconds):
                try:
                    ids, cut = model.encode(firsts, second, cut="only_first" if self.hypotheses else "longest_first")
                except Exception as error:  # the tokenizer's own kind of error
                    self._check_hypotheses(model)
                    raise PlanError(
                        f"tokenising for {model.member.checkpoint.shown}",
                        found=cause_line(error),
                        allowed="texts that its tokenizer takes",
                        do="check the files of its tokenizer",
                    ) from error
                truncated.update(cut)
                for row, of_row in zip(of_model, ids, strict=True):
                    row.append(of_row)
            for i, row in enumerate(of_model):
                sequences[i] += row
                costs[i] += len(row) * max(map(len, row))
                if not min(map(len, row)):
                    failures.setdefault(i, _EMPTY)
        more = None
        if self.task.head.kind == "token":
            cut_texts = (self._beginning(text) if i in truncated else text for i, text in enumerate(firsts))
            more = [_packed(text) for text in cut_texts]
        elif len(sequences[0]) > 1:
            more = [tuple(map(len, row)) for row in sequences]
        return Prepared(
            ids=[row[0] if len(row) == 1 else np.concatenate(row) for row in sequences],
            truncated=sorted(truncated - failures.keys()),
            more=more,
            costs=costs,
            failures=failures,
        )

    def _seconds(self, firsts: list[str], seconds: list[str] | None) -> list[list[str] | None]:
        """The second texts of all rows, for each sequence of a row."""
        if self.hypotheses:
            return [[hypothesis] * len(firsts) for hypothesis in self.hypotheses]
        return [seconds]

    def _beginning(self, text: str) -> str:
        """As much of a text as gives the same tokens, cut to the limit."""
        model = self.models[0]
        ids, _ = model.encode([text])
        told = model.tokenizer(text, truncation=True, max_length=model.member.max_length, verbose=False)
        if not told.is_fast:
            return text
        beginning = text[: max(end for _, end in told.encodings[0].offsets) + _BEHIND]
        again, _ = model.encode([beginning])
        return beginning if again[0].tolist() == ids[0].tolist() else text

    def _check_hypotheses(self, model: Classifier) -> None:
        for hypothesis in self.hypotheses:
            length = len(model.tokenizer("", hypothesis, verbose=False)["input_ids"])
            if length >= model.member.max_length:
                raise PlanError(
                    f"--labels with {model.member.checkpoint.shown}",
                    found=f"{hypothesis!r:.80} has {length} tokens, and no room is left for a text",
                    allowed=f"fewer than {model.member.max_length} tokens",
                    do="use shorter labels or a larger --max-length",
                )

    def filler(self) -> np.ndarray:
        """The sequences of an empty text."""
        import numpy as np

        return np.concatenate([ids for of_model in self._fillers() for ids in of_model])

    def _fillers(self) -> list[list[np.ndarray]]:
        """For each model the sequences of an empty text."""
        seconds: list[str | None] = [*self.hypotheses] or [None if self.task.pair is None else ""]
        return [[model.filler(second) for second in seconds] for model in self.models]

    def load(self) -> None:
        for model in self.models:
            model.load()

    def close(self) -> None:
        """The processes of split models end."""
        for model in self.models:
            model.close()

    def compute(self, batch: ModelBatch) -> dict[str, Any]:
        """Rows -> {"label": [B], "score": [B], and "labels": [B] of lists where asked}, or {"entities": [B]}."""
        self.load()
        if self.task.head.kind == "token":
            return {"entities": self._entities(batch)}
        from fanfold.tasks import scores

        task, votes = self.task, self.task.merge == "vote"
        scores_MBC = self._scores(batch)
        if votes:
            label, score = scores.voted(scores_MBC)
            return {"label": [task.labels[i] for i in label], "score": [float(share) for share in score]}
        scores_BC = scores_MBC[0]
        if len(scores_MBC) > 1:
            independent = self._independent()
            scores_BC = scores.mean_scores(
                scores_MBC, independent=independent, probabilities=bool(self.hypotheses) or task.function != "none"
            )
        labels, best = scores.best(scores_BC, task.labels)
        results: dict[str, Any] = {"label": labels, "score": best}
        if task.ranks:
            results["labels"] = scores.ranked(scores_BC, task.labels, most=task.top_k, threshold=task.threshold)
        return results

    def _independent(self) -> bool:
        """Whether a label's score says nothing of the other labels'."""
        if self.hypotheses:
            return self.task.multi_label or len(self.hypotheses) == 1
        return self.task.function == "sigmoid"

    def _scores(self, batch: ModelBatch) -> np.ndarray:
        """[models, B, labels]."""
        import numpy as np

        from fanfold.tasks import scores

        found = []
        for model, (sequences, length) in zip(self.models, self._sequences(batch), strict=True):
            logits = self._logits(model, sequences, length)
            if self.hypotheses:
                entailment = model.member.head.entailment
                assert entailment is not None
                logits_BHC = logits.reshape(len(batch.ids), len(self.hypotheses), -1)
                found.append(scores.zero_shot_scores(logits_BHC, entailment, independent=self._independent()))
            else:
                found.append(scores.scores_of(logits, self.task.function)[:, list(model.member.order)])
        return np.stack(found)

    def _sequences(self, batch: ModelBatch) -> list[tuple[list[np.ndarray], int]]:
        """For each model the sequences of all rows, row by row, and the length they are padded to.

        The length is that of the rows themselves, also of those that a filler stands in for.
        """
        fillers = self._fillers() if batch.left_out else []
        per_model = len(self.hypotheses) or 1
        found: list[tuple[list[np.ndarray], int]] = []
        for m in range(len(self.models)):
            places = slice(m * per_model, (m + 1) * per_model)
            length = max(max(lengths[places]) for lengths in batch.more) if batch.more else batch.length
            sequences: list[np.ndarray] = []
            for row, ids in enumerate(batch.ids):
                if row in batch.left_out:
                    sequences += [filler[:length] for filler in fillers[m]]
                elif not batch.more:
                    sequences.append(ids)
                else:
                    borders = list(pairwise(accumulate(batch.more[row], initial=0)))[places]
                    sequences += [ids[start:stop] for start, stop in borders]
            found.append((sequences, length))
        return found

    def _logits(self, model: Classifier, sequences: list[np.ndarray], length: int) -> np.ndarray:
        """As many sequences at once as the budget of a batch allows: a row of many labels is more than one batch."""
        import numpy as np

        rows = max(1, self.batch_tokens // length)
        return np.concatenate(
            [model.outputs(sequences[at : at + rows], length) for at in range(0, len(sequences), rows)]
        )

    def _entities(self, batch: ModelBatch) -> list[list[dict[str, Any]]]:
        from fanfold.tasks.classifier import TYPE_AT
        from fanfold.tasks.entities import entities_of, tokens_of

        model, task = self.models[0], self.task
        logits_BLC = model.outputs([ids[: batch.length] for ids in batch.ids], batch.length)
        rows: list[list[dict[str, Any]]] = []
        for row, ids in enumerate(batch.ids):
            if row in batch.left_out:
                rows.append([])
                continue
            text = _unpacked(batch.more[row])
            told = model.tokenizer(
                text,
                truncation=True,
                max_length=model.member.max_length,
                return_special_tokens_mask=True,
                return_offsets_mapping=model.tokenizer.is_fast,
                verbose=False,
            )
            tokens = tokens_of(
                text,
                (ids & ((1 << TYPE_AT) - 1)).tolist(),
                logits_BLC[row, : len(ids)],
                special=told["special_tokens_mask"],
                offsets=told.get("offset_mapping"),
                tokenizer=model.tokenizer,
            )
            found = entities_of(tokens, task.labels, task.aggregation, model.tokenizer)
            rows.append([entity for entity in found if task.threshold is None or entity["score"] >= task.threshold])
        return rows


def _pairs(texts: Sequence[str], pair: str, failures: dict[int, tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Both texts of each row; rows without them are failures, and empty here."""
    from fanfold.data.kept import words_for

    firsts, seconds = [], []
    for i, text in enumerate(texts):
        found = json.loads(text)
        names = [*(name for name in found if name != pair), pair]
        for name in names:
            if name not in found:
                failures[i] = ("MissingColumn", f"no column '{name}'")
            elif found[name] is None:
                failures[i] = ("NullText", f"column '{name}' is null")
            elif not isinstance(found[name], str):
                failures[i] = ("NotText", f"column '{name}' holds {words_for(found[name])}, not a string")
        if len(names) == 1 and i not in failures:
            failures[i] = ("MissingColumn", f"no first text beside the column '{pair}'")
        firsts.append("" if i in failures else found[names[0]])
        seconds.append("" if i in failures else found[pair])
    return firsts, seconds


def _packed(text: str) -> tuple[int, ...]:
    """The text as whole numbers: its length in bytes, and eight bytes of UTF-8 in each of the others."""
    import numpy as np

    data = text.encode()
    return (len(data), *np.frombuffer(data + b"\0" * (-len(data) % 8), dtype="<i8").tolist())


def _unpacked(numbers: Sequence[int]) -> str:
    import numpy as np

    return np.asarray(numbers[1:], dtype="<i8").tobytes()[: numbers[0]].decode()
