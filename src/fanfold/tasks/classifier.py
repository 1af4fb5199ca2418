"""One checkpoint with a head of classification on one unit: texts to token ids, token ids to the head's outputs.

Shapes: B sequences, L padded length, C labels.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.parallel.mesh import Split
from fanfold.tasks.loading import open_model, open_tokenizer
from fanfold.tasks.parallel_model import ParallelModel, ends_with_its_group

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fanfold.parallel.program import Here
    from fanfold.plan.numerics import Dtype
    from fanfold.tasks.classify import Member

TYPE_AT = 24  # a token's type (first or second text of a pair) stands in the bits above its id
_ID = (1 << TYPE_AT) - 1
_SAME = {"float32": 1e-3, "bfloat16": 0.25}  # of outputs, beside their spread


class Classifier:
    """Tokenizer at the first use, model at `load`."""

    def __init__(self, member: Member, device: str, dtype: Dtype, split: Split | None = None) -> None:
        self.member = member
        self.device = device
        self.dtype = dtype
        self.split = split or Split()
        self._tokenizer: Any = None
        self._model: Any = None
        self._pad_id = 0
        self._takes: frozenset[str] = frozenset()  # names of the model's arguments
        self._left = False  # where the padding stands
        self._every_position = False  # whether it gives outputs of all positions, as it cannot choose the last

    # -- tokens ---------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.member.checkpoint)
        return self._tokenizer

    def encode(
        self, texts: list[str], seconds: list[str] | None = None, *, cut: str = "longest_first"
    ) -> tuple[list[np.ndarray], list[int]]:
        """Texts, or pairs with `seconds` -> int32 ids with the tokens' types in them, and which ones were cut."""
        import numpy as np

        limit = self.member.max_length
        found = self.tokenizer(
            texts, seconds, truncation=cut, max_length=limit, return_attention_mask=False, verbose=False
        )
        ids = [np.asarray(row, dtype=np.int32) for row in found["input_ids"]]
        if "token_type_ids" in found:
            types = (np.asarray(row, dtype=np.int32) for row in found["token_type_ids"])
            ids = [row | of_row << TYPE_AT for row, of_row in zip(ids, types, strict=True)]
        full = [i for i, row in enumerate(ids) if len(row) >= limit]
        if found.is_fast:
            return ids, [i for i in full if found.encodings[i].overflowing]
        whole = (self.tokenizer(texts[i], seconds and seconds[i], verbose=False)["input_ids"] for i in full)
        return ids, [i for i, row in zip(full, whole, strict=True) if len(row) > limit]

    def filler(self, second: str | None) -> np.ndarray:
        """The ids of an empty text, or pair; the padding token where there are none."""
        import numpy as np

        ids, _ = self.encode([""], None if second is None else [second])
        return ids[0] if len(ids[0]) else np.asarray([self.tokenizer.pad_token_id or 0], dtype=np.int32)

    # -- model ----------------------------------------------------------------------------------------

    def load(self) -> None:
        """The model is in memory, and does not mind padding."""
        if self._model is not None:
            return
        import torch
        import transformers

        token = self.member.head.kind == "token"
        split = self.split.units > 1
        if split:
            model, cls, model_config = self._open_split()
        else:
            loader = transformers.AutoModelForTokenClassification if token else None
            loader = loader or transformers.AutoModelForSequenceClassification
            model = open_model(loader, self.member.checkpoint, dtype=getattr(torch, self.dtype)).to(self.device)
            cls, model_config = type(model), model.config
        if model_config.num_labels != len(self.member.head.labels):
            raise self._unusable(f"{model_config.num_labels} outputs for {len(self.member.head.labels)} labels")
        config = model_config.get_text_config()
        choices = (config.pad_token_id, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self._pad_id = next(choice for choice in choices if isinstance(choice, int) and choice >= 0)
        if config.pad_token_id is None and not token:
            # Heads named score read the last token, and need a padding token to find it among several rows.
            give = partial(model.apply, _give_every_position) if split else partial(every_position, model)
            self._every_position = bool(give(pad_id=self._pad_id))
        # What the tokenizer does not give is not the same as zeros: GPT-2 takes them for tokens.
        taken = set(inspect.signature(cls.forward).parameters)
        self._takes = frozenset(taken & {"use_cache", *self.tokenizer.model_input_names})
        self._model = model
        self._left = self.member.checkpoint.model_type == "xlnet"  # its summary is the last position
        try:
            self._check_padding()
        except BaseException:
            self._model = None
            raise

    def close(self) -> None:
        """The processes of a split model end."""
        if isinstance(self._model, ParallelModel):
            self._model.close()

    def _open_split(self) -> tuple[ParallelModel, Any, Any]:
        """The model over several processes, its class and its config."""
        from fanfold.parallel.split import architecture, config_of

        folder, head = self.member.checkpoint.path, self.member.head.kind
        config = config_of(folder)
        cls = architecture(config, head=head)
        model = ParallelModel(str(folder), self.split, dtype=self.dtype, timeout_s=60.0, head=head)
        return model, cls, config

    def _check_padding(self) -> None:
        """PlanError where a row's outputs depend on how far it is padded: another architecture's rule."""
        import numpy as np

        (short, long), _ = self.encode(["a", "a b c d e f g h"])
        if not len(short):
            return
        together = self.outputs([short, long], len(long))[0]
        alone = self.outputs([short], len(short))[0]
        if self.member.head.kind == "token":
            together = together[: len(short)]
        spread = float(np.abs(alone).max()) + 1
        found = float(np.abs(together - alone).max())
        if not found <= _SAME[self.dtype] * spread:
            raise self._unusable(f"outputs that differ by {found:.2g} where a row is padded")

    def _unusable(self, found: str) -> PlanError:
        return PlanError(
            f"classifying with {self.member.checkpoint.shown}",
            found=found,
            allowed="heads of transformers that give each row its own outputs",
            do="choose another checkpoint",
        )

    def outputs(self, sequences: Sequence[np.ndarray], length: int) -> np.ndarray:
        """Ids as `encode` gives them -> float32 [B, C], of a token head [B, L, C] with padding behind."""
        import numpy as np
        import torch

        ids_BL = np.full((len(sequences), length), self._pad_id, dtype=np.int64)
        mask_BL = np.zeros_like(ids_BL)
        types_BL = np.zeros_like(ids_BL)
        for row, tokens in enumerate(sequences):
            place = slice(length - len(tokens), None) if self._left else slice(len(tokens))
            ids_BL[row, place] = tokens & _ID
            types_BL[row, place] = tokens >> TYPE_AT
            mask_BL[row, place] = 1
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if "token_type_ids" in self._takes:
            inputs["token_type_ids"] = types_BL
        tensors: dict[str, Any] = {name: torch.from_numpy(value).to(self.device) for name, value in inputs.items()}
        if "use_cache" in self._takes:
            tensors["use_cache"] = False
        with torch.inference_mode(), ends_with_its_group():
            logits = self._model(**tensors).logits
            if self._every_position:
                last_B = tensors["attention_mask"].sum(dim=1).clamp(min=1) - 1
                logits = logits[torch.arange(len(last_B), device=last_B.device), last_B]
            found: np.ndarray = logits.to(torch.float32).cpu().numpy()
        if self._left and self.member.head.kind == "token":
            behind = [np.roll(row, len(tokens) - length, axis=0) for row, tokens in zip(found, sequences, strict=True)]
            return np.stack(behind)
        return found


def every_position(model: Any, pad_id: int) -> bool:
    """From now on the model's logits are those of all positions [B, L, C], where its head can give them."""
    if not hasattr(model, "score"):
        return False
    found: list[Any] = []
    model.config.get_text_config().pad_token_id = pad_id
    model.score.register_forward_hook(lambda _, __, output: found.append(output))
    model.register_forward_hook(lambda _, __, out: setattr(out, "logits", found.pop()))
    return True


def _give_every_position(here: Here, pad_id: int) -> bool:
    return every_position(here.share.model, pad_id)
