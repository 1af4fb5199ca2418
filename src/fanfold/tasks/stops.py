"""Stop strings across the borders of tokens, as transformers' own criterion finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_TOKEN = 2**31 - 1  # beyond every vocabulary: the criterion takes it for a token that matches nothing


class StopStrings:
    """Called with token ids, prompt included, it says which sequences now end with a stop string."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        import transformers

        self._criterion = transformers.StopStringCriteria(tokenizer, list(strings))

    def __call__(self, histories: Sequence[Sequence[int]]) -> list[bool]:
        import torch

        width = self._criterion.maximum_token_len
        tails = [[_NO_TOKEN] * (width - len(ids)) + list(ids[-width:]) for ids in histories]
        return [bool(stop) for stop in self._criterion(torch.tensor(tails), None).tolist()]
