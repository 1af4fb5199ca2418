"""A window from its line in the log."""

from __future__ import annotations

from typing import Any

from fanfold.data.source import Span, Window


def window_of(entry: dict[str, Any]) -> Window:
    names = ("file", "start", "stop", "rows", "first_line")
    return Window(
        index=entry["window"],
        first_row=entry["first_row"],
        num_rows=entry["num_rows"],
        spans=tuple(Span(**dict(zip(names, span, strict=True))) for span in entry["spans"]),
        sha256=entry["sha256"],
    )
