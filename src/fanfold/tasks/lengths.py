"""How many tokens texts have, without transformers: for a prediction before any unit has started."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fanfold import extras

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.tasks.checkpoint import Checkpoint


def token_lengths(checkpoint: Checkpoint, texts: Sequence[str], max_length: int) -> list[int] | None:
    """Tokens of each text, special tokens included, cut to the limit; None where there is no fast tokenizer.

    tokenizers' own library reads tokenizer.json: a few milliseconds instead of transformers' imports.
    """
    path = checkpoint.path / "tokenizer.json"
    if not path.is_file() or not extras.has("tokenizers"):
        return None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return [min(max_length, len(found.ids)) for found in tokenizer.encode_batch(list(texts))]
    except Exception:  # a file that this version cannot read: no reason to stop a job for a prediction
        return None
