"""--layout of a verb: how its model is cut over processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.parallel.families import check_split, has_table
from fanfold.parallel.mesh import Split, parse_split
from fanfold.tasks.checkpoint import first_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.tasks.checkpoint import Checkpoint


def read_layout(layout: str | None, checkpoints: Sequence[Checkpoint], *, verb: str, context: bool = False) -> Split:
    """The layout, checked with the model as far as its config tells. `context`: whether the verb can cut sequences.

    Raises: PlanError.
    """
    split = parse_split(layout) if layout else Split()
    if split.units == 1:
        return split
    if len(checkpoints) > 1:
        raise PlanError(
            f"--layout {layout} with {len(checkpoints)} times --model",
            found="several models, each of which would have processes of its own",
            allowed="--layout with one model",
            do="leave --layout away, or run one model after the other",
        )
    if split.context > 1 and not context:
        raise PlanError(
            f"--layout {layout} with fanfold {verb}",
            found="sequences cut over processes",
            allowed="tensor=N, pipeline=N; context=N with fanfold embed, ff.parallel and fanfold equal",
            do="leave context away",
        )
    if verb == "generate" and checkpoints[0].config.get("is_encoder_decoder") and split.pipeline > 1:
        raise PlanError(
            f"--layout {layout} with fanfold generate",
            found=f"{checkpoints[0].model_type}, an encoder-decoder",
            allowed="pipeline=1: its encoder is called apart from the decoder",
            do=f"use tensor={split.units}",
        )
    config = SimpleNamespace(**_with_defaults(checkpoints[0]))
    check_split(config, split)
    if has_table(config):
        return split
    from fanfold.tasks.derived import with_table

    return with_table(checkpoints[0].path, split)


def layout_setting(split: Split) -> dict[str, str]:
    """The setting, as options and numerics hold it; nothing for a whole model."""
    return {"layout": str(split)} if split.units > 1 else {}


def shown_layout(split: Split) -> str:
    more = f", by {split.shown_check}" if split.table else ""
    return f"{split}: {split.units} processes share one model{more}"


def _with_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config with the names that the check of a layout asks for; what it leaves out is refused on the units."""
    config = checkpoint.config
    known = {
        "num_hidden_layers": first_of(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or 1,
        "num_attention_heads": first_of(
            config, "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"
        ),
        "hidden_size": first_of(config, "hidden_size", "n_embd", "dim", "d_model"),
    }
    return {**config, **known, "model_type": checkpoint.model_type}
