"""Products of a few rows with a model's weights, by the library that is faster at them.

PyTorch gives float32 linear layers to MKL, which takes the weights as they are stored, one row an output. For 3 to a
few hundred rows oneDNN is 1.3 to 2 times as fast at that where the CPU has AVX-512, and no faster elsewhere
(docs/log.md). Decoding is made of such products. Weights stay where they are: mapped, shared and unpacked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_FEWEST_ROWS = 3  # MKL reads the weights of one row or two at the bandwidth of memory


class _Linear(nn.Linear):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() < _FEWEST_ROWS * self.in_features:
            return nn.functional.linear(x, self.weight, self.bias)
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return found


def quicken(model: Any) -> Any:
    """The model, its float32 linear layers on the CPU computed by oneDNN where that is faster. For inference only."""
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        for module in model.modules():
            weight: Any = getattr(module, "weight", None)
            if type(module) is nn.Linear and weight.dtype == torch.float32 and weight.device.type == "cpu":
                module.__class__ = _Linear
    return model
