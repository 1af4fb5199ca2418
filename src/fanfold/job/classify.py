"""`classify` from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fanfold.job.verbs import call

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def classify(
    data: Any,
    out: str | Path | None = None,
    *,
    model: str | Sequence[str],
    column: str = "text",
    on: str = "cpu",
    on_error: str | None = None,
    show: bool = False,
    **options: Any,
) -> Any:
    """Labels and scores of texts, as transformers' pipelines would give them.

    A head of sequence classification gives `label` and `score`, with `top_k` or `multi_label` also `labels`, a list
    of {label, score}; a head of token classification gives `entities`. `labels=["a", "b"]` are labels of your own
    for a model of inference; `pair="answer"` names the second column of pairs; several models with `merge="mean"` or
    `"vote"` are an ensemble.

    With `out`: `data` names files (a path, a glob, or a list of them); returns a Run. Without: `data` is a list of
    texts, a Series or an array (a list of dicts comes back), or a frame, an Arrow table or a list of dicts (frames
    come back with the result columns). Row order is kept.

    `on_error` in memory is `stop` (DataError names the row) unless it is `null` (null for that row).
    Other keywords are the command line's: hypothesis_template, threshold, aggregation, max_length, keep, id, ...
    Raises: the errors of fanfold.errors; MissingExtra says what to install.
    """
    return call("classify", data, out, column=column, model=model, on=on, on_error=on_error, show=show, **options)
