"""Output that a JSON schema allows and nothing else: tokens that would break it are never chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold import extras
from fanfold.errors import RequestError

if TYPE_CHECKING:
    import torch


def read_schema(given: Any) -> str:
    """A schema as JSON text, from a file's name, an object, or a pydantic model. Raises RequestError, MissingExtra."""
    if hasattr(given, "model_json_schema"):
        schema = given.model_json_schema()
    elif isinstance(given, dict):
        schema = given
    else:
        try:
            schema = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            raise _refused(given, f"{type(error).__name__}: {error}") from None
    if not isinstance(schema, dict | bool):
        raise _refused(given, f"a {type(schema).__name__}")
    llguidance = extras.need("llguidance", extra="schema", purpose="--json-schema")
    text = json.dumps(schema)
    grammar = _grammar(llguidance, text)
    problem = llguidance.LLMatcher.validate_grammar(grammar)
    if problem:
        raise _refused(given, str(problem).splitlines()[0])
    return text


def _grammar(llguidance: Any, schema: str) -> str:
    """Without white space between tokens of JSON: a model could go on with it for ever."""
    grammar: str = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
    return grammar


def _refused(given: Any, found: str) -> RequestError:
    return RequestError(
        f"--json-schema {str(given)[:80]}",
        found=found,
        allowed="a JSON Schema as llguidance reads it: a file, in Python also an object or a pydantic model",
        do="correct the schema",
    )


class Guides:
    """Makes a guide for each row; the tokenizer is read once."""

    def __init__(self, tokenizer: Any, schema: str, *, vocabulary: int, eos: frozenset[int]) -> None:
        import llguidance
        from llguidance import hf

        self._kind = llguidance.LLMatcher
        self._tokenizer = hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(eos) or None)
        self._grammar = _grammar(llguidance, schema)
        self._first = self._kind(self._tokenizer, self._grammar)

    def new(self) -> Guide:
        return Guide(self._first.deep_copy())


class Guide:
    """One row's way through the grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def restrict(self, logits: torch.Tensor) -> None:
        """Tokens [V] that the grammar does not allow next become -inf."""
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        num_known = min(len(allowed), len(logits))
        logits[:num_known].masked_fill_(~allowed[:num_known], -float("inf"))
        logits[num_known:] = -float("inf")

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; whether the output is complete and cannot go on."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())

    @property
    def complete(self) -> bool:
        """Whether what was taken so far is a whole output."""
        return bool(self._matcher.is_accepting() or (self._matcher.is_stopped() and not self._matcher.is_error()))
