"""What stands in a stage's tree where other stages compute: shapes without values, and ways through."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fanfold.parallel.signature import returns_tuple
from fanfold.parallel.stacks import BIAS


class Pass(nn.Module):  # type: ignore[misc]
    """Another stage's block: hidden states go through; a cache learns how many tokens there were, and no more."""

    def __init__(self, block: Any, number: int) -> None:
        super().__init__()
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))
        self._number = number
        self._tuple = returns_tuple(type(block))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._count(hidden_states, kwargs)
        return (hidden_states,) if self._tuple else hidden_states

    def _count(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> int:
        """Tokens that the cache holds before this call."""
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        cache = getattr(cache, "self_attention_cache", cache)
        if cache is None or not hasattr(cache, "update"):
            return 0
        before = int(cache.get_seq_length(self._number))
        nothing = hidden_states.new_zeros((hidden_states.shape[0], 1, hidden_states.shape[1], 1))
        cache.update(nothing, nothing, self._number)
        return before


class BiasPass(Pass):
    """Another stage's block of T5: the position bias goes through, too; the first block of a stack makes it.

    Every stage of a stack holds the bias's embedding, under its own name; their gradients are summed.
    """

    def __init__(self, block: Any, number: int, *, makes: bool) -> None:
        super().__init__(block, number)
        self._makes = makes
        if makes:
            attention = block.get_submodule(BIAS.rpartition(".")[0])
            for leaf in ("q", "k", "v", "o"):
                delattr(attention, leaf)
            self.layer = nn.ModuleList([nn.Module()])
            self.layer[0].SelfAttention = attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_bias: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        encoder_decoder_position_bias: Any = None,
        **kwargs: Any,
    ) -> Any:
        before = self._count(hidden_states, kwargs)
        if self._makes:
            count = hidden_states.shape[1]
            position_bias = self.layer[0].SelfAttention.compute_bias(count, before + count, past_seen_tokens=before)
        return hidden_states, position_bias, encoder_decoder_position_bias


def pass_for(block: Any, number: int, *, makes_bias: bool) -> Pass:
    """The way through instead of a block."""
    if "position_bias" in inspect.signature(type(block).forward).parameters:
        return BiasPass(block, number, makes=makes_bias)
    return Pass(block, number)


class _Zeros(nn.Module):  # type: ignore[misc]
    """An embedding of another stage: the shape of its result, without its values."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self._dtype = rows, width, dtype

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((*ids.shape, self.embedding_dim), dtype=self._dtype)


class _Frames(nn.Module):  # type: ignore[misc]
    """A convolution of another stage: [B, C, ...] -> zeros in the shape that it would give."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.stride = conv.stride
        self.weight = torch.empty(0, dtype=conv.weight.dtype)  # asked for its dtype
        self._channels, self._kernel, self._padding = conv.out_channels, conv.kernel_size, conv.padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = zip(x.shape[2:], self._kernel, self._padding, self.stride, strict=True)
        shape = [(size + 2 * padding - kernel) // stride + 1 for size, kernel, padding, stride in sizes]
        return x.new_zeros((x.shape[0], self._channels, *shape))


class _Same(nn.Module):  # type: ignore[misc]
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x


def stub(module: Any) -> Any:
    """Instead of a module with weights in front of the blocks."""
    if isinstance(module, nn.Embedding) or hasattr(module, "embedding_dim"):
        return _Zeros(module.weight.shape[0], module.weight.shape[1], module.weight.dtype)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _Frames(module)
    if next(module.children(), None) is not None:  # it does more than its own weights: zeros stand for them
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                delattr(module, name)
                setattr(module, name, torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
        return module
    return _Same()
