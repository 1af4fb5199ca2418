"""What is read of a record: one column of texts, or several columns of any kind.

Several columns travel as one text, a JSON object of those that the record has; the task takes it apart again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Collection

# One column, which holds the text; or alternatives: the first of which all columns are there is read.
Reading: TypeAlias = str | tuple[tuple[str, ...], ...]


def columns_of(reading: Reading, there: Collection[str]) -> tuple[str, ...]:
    """The columns to read where these are there; the last alternative where none fits."""
    if isinstance(reading, str):
        return (reading,)
    for names in reading:
        if all(name in there for name in names):
            return names
    return reading[-1]
