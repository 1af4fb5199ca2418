"""A layout of training: how many devices each method gets, and the knobs that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """data x tensor x pipeline x context devices; experts are spread over data, context and tensor."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    micro_batch: int = 1
    interleave: int = 1
    zero: int = 0
    recompute: Recompute = "none"
    recompute_share: float = 1.0  # of the layers, where recompute is full
    sequence_parallel: bool = True

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def expert_tensor(self) -> int:
        """Cut of one expert's matrices: the tensor degree, less where experts need its devices."""
        room = self.data * self.context
        return self.tensor if self.expert <= room else max(1, self.tensor * room // self.expert)

    def record(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "data": self.data,
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "context": self.context,
            "expert": self.expert,
            "micro_batch": self.micro_batch,
            "interleave": self.interleave,
            "zero": self.zero,
            "recompute": self.recompute,
            "recompute_share": self.recompute_share,
            "sequence_parallel": self.sequence_parallel,
        }

    def __str__(self) -> str:
        named = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        more = {"context": self.context, "expert": self.expert, "interleave": self.interleave, "zero": self.zero}
        shown = {**named, **{name: value for name, value in more.items() if value > (name != "zero")}}
        text = " ".join(f"{name}={value}" for name, value in shown.items())
        return f"{text} micro-batch={self.micro_batch} recompute={self.recompute}"
