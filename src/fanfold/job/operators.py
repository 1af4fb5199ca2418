"""The operators of a transformer as torch computes them on a CPU: what `machine/measure.py` takes the time of.

Every run allocates its result, as a model's layers do.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fanfold.machine.rates import Shape

_DRAWN = 100_003
_drawn: torch.Tensor | None = None
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
}


class TorchOperators:
    """float32, without gradients."""

    @property
    def name(self) -> str:
        return f"torch {torch.__version__}"

    def operator(self, kind: str, shape: Shape) -> Callable[[], object]:
        if kind == "gemm":
            m, k, n = shape
            return _quiet(partial(functional.linear, _random(m, k), _random(n, k), _random(n)))
        if kind == "attention":
            rows, heads, length, width = shape
            q, k, v = (_random(rows, length, heads, width).transpose(1, 2) for _ in range(3))
            mask = torch.zeros(rows, 1, length, length)  # as a model gives it where rows are padded
            return _quiet(lambda: functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).contiguous())
        tokens, width = shape
        x = _random(tokens, width)
        if kind in _ACTIVATIONS:
            return _quiet(partial(_ACTIVATIONS[kind], x))
        if kind == "layer_norm":
            return _quiet(partial(functional.layer_norm, x, (width,), torch.ones(width), torch.zeros(width)))
        return _quiet(partial(torch.add, x, _random(tokens, width)))

    def copy(self, num_bytes: int) -> Callable[[], object]:
        source, target = torch.ones(num_bytes // 4), torch.zeros(num_bytes // 4)
        return partial(target.copy_, source)

    def smallest(self) -> Callable[[], object]:
        layer, x = torch.nn.Linear(8, 8), _random(1, 8)
        return _quiet(partial(layer, x))

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _random(*sides: int) -> torch.Tensor:
    """Numbers that differ, of any shape: a few are drawn, and repeated."""
    global _drawn
    if _drawn is None:
        _drawn = torch.randn(_DRAWN)
    count = math.prod(sides)
    return _drawn.repeat(-(-count // _DRAWN))[:count].reshape(sides).contiguous()


def _quiet(run: Callable[[], object]) -> Callable[[], object]:
    def inner() -> object:
        with torch.inference_mode():
            return run()

    return inner
