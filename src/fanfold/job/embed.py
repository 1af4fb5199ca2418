"""`embed` from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fanfold.job.verbs import call

if TYPE_CHECKING:
    from pathlib import Path


def embed(
    data: Any,
    out: str | Path | None = None,
    *,
    column: str = "text",
    model: str | None = None,
    on: str = "cpu",
    on_error: str | None = None,
    show: bool = False,
    **options: Any,
) -> Any:
    """Embeddings of texts, as sentence-transformers' `encode` would give them.

    With `out`: `data` names files (a path, a glob, or a list of them); returns a Run. Without: `data` is a list
    of texts, a Series or an array of texts (an ndarray float32 [n, d] comes back), or a frame or Arrow table
    (it comes back with the column `embedding`); a path is read. Row order is kept.

    `on_error` in memory is `stop` (DataError names the row) unless it is `null` (NaN or null for that row).
    Other keywords are the command line's: revision, dtype, max_length, chunk, prefix_text, keep, id, ...
    Raises: the errors of fanfold.errors; MissingExtra says what to install.
    """
    return call("embed", data, out, column=column, model=model, on=on, on_error=on_error, show=show, **options)
