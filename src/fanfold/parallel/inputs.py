"""What a model is fed with where it is compared with its split self: awkward lengths, padding on both sides."""

from __future__ import annotations

from typing import Any

import torch

_ROWS, _LENGTH, _TARGET = 3, 17, 11
# Rows that begin with nothing but padding are NaN in the whole BLOOM, too.
_NO_LEFT_PADDING = ("bloom",)


def inputs_for(model: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """Three rows: whole, padded on the right, padded on the left where the model bears it.

    Token ids [3, 17]; for an encoder-decoder 11 more for the decoder; frames or pixels where it takes those.
    """
    config = model.config
    chance = torch.Generator().manual_seed(seed)
    main = model.main_input_name
    if main == "pixel_values":
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        return {main: _noise((_ROWS, config.num_channels, height, width), chance, model.dtype)}
    found: dict[str, torch.Tensor] = {}
    if main == "input_features":
        shape = (_ROWS, config.num_mel_bins, 2 * config.max_source_positions)
        found[main] = _noise(shape, chance, model.dtype)
    else:
        left = config.model_type not in _NO_LEFT_PADDING
        found["input_ids"], found["attention_mask"] = _tokens(config.get_text_config(), _LENGTH, left, chance)
    if config.is_encoder_decoder:
        ids, mask = _tokens(config.get_text_config(), _TARGET, False, chance)
        found |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return found


def labels_for(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the loss is taken over: the decoder's tokens where there is a decoder of its own, padding left out."""
    if "decoder_input_ids" not in inputs:
        return inputs["input_ids"]
    return inputs["decoder_input_ids"].masked_fill(inputs["decoder_attention_mask"] == 0, -100)


def _tokens(config: Any, length: int, left: bool, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, config.vocab_size, (_ROWS, length), generator=chance)
    mask = torch.ones_like(ids)
    mask[1, length - 4 :] = 0
    if left:
        mask[2, :4] = 0
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    return torch.where(mask == 1, ids, pad), mask


def _noise(shape: tuple[int, ...], chance: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype)
