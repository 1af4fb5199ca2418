"""`generate` from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fanfold.job.verbs import call

if TYPE_CHECKING:
    from pathlib import Path


def generate(
    data: Any,
    out: str | Path | None = None,
    *,
    model: str | list[str],
    column: str = "text",
    on: str = "cpu",
    on_error: str | None = None,
    show: bool = False,
    **options: Any,
) -> Any:
    """Answers of a language model, as transformers' `generate` would give them; greedy unless an option asks.

    With `out`: `data` names files (a path, a glob, or a list of them); returns a Run. Without: `data` is a list of
    texts or of rows as dicts (a list of dicts comes back: generated_text, finish_reason, prompt_tokens,
    completion_tokens), or a frame or Arrow table (it comes back with these columns); a path is read.

    `json_schema` is a file, an object or a pydantic model. `on_error` in memory is `stop` (DataError names the row)
    unless it is `null` (None for that row). Other keywords are the command line's: prompt, chat, system,
    max_new_tokens, stop, temperature, top_p, top_k, min_p, repetition_penalty, seed, full_text, keep, id, ...
    Raises: the errors of fanfold.errors; MissingExtra says what to install.
    """
    return call("generate", data, out, column=column, model=model, on=on, on_error=on_error, show=show, **options)
