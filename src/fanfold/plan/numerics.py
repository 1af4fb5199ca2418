"""The numerics record: everything that shapes the bytes of a result, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fanfold.plan.layout import processes_of

# Raised whenever a release changes the bytes that the same numerics record gives.
NUMERICS_VERSION = 1

Dtype = Literal["float32", "bfloat16"]
WINDOW_ROWS = 4096
BATCH_TOKENS = 2048
PART_BYTES = 128_000_000
_OTHER_BYTES_PER_ROW = 512  # a guess at the kept columns; it only decides how many windows share a part


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Defaults depend on the task, the model's config and the device class; never on a unit count or a clock.

    Why these: rows sorted by length in windows of 4,096 leave 2 % padding on real text, and 2,048-token
    batches are half a second of a small BERT on one core, small enough to balance (measured, docs/log.md).
    """

    window_rows: int = WINDOW_ROWS
    batch_tokens: int = BATCH_TOKENS
    piece_batches: int = 1
    order: str = "length_descending"
    dtype: Dtype = "float32"
    threads_per_unit: int = 1
    compiled: bool = False  # by --compile
    layout: str = "whole"  # how one model is cut, by --layout
    device: str = "cpu"
    windows_per_part: int = 1
    version: int = NUMERICS_VERSION

    def record(self) -> dict[str, Any]:
        """Plain values, as run.json stores them."""
        return asdict(self)

    @property
    def processes(self) -> int:
        """Over how many processes one model is cut."""
        return processes_of(self.layout)

    @property
    def level(self) -> str:
        """Sameness promised for values: B on a CPU in float32, uncompiled; T elsewhere."""
        return (
            "B"
            if self.device == "cpu" and self.dtype == "float32" and not self.compiled and self.layout == "whole"
            else "T"
        )


def windows_per_part(window_rows: int, result_bytes_per_row: int) -> int:
    """The smallest number of windows whose part is expected to reach 128 MB."""
    window_bytes = window_rows * (result_bytes_per_row + _OTHER_BYTES_PER_ROW)
    return max(1, -(-PART_BYTES // window_bytes))
