"""Which mixtures of experts can be cut how: known from the config, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Split

TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


def check_experts(config: Any, split: Split) -> None:
    """PlanError for experts that cannot be cut so."""
    asked = f"--layout {split}"
    if split.expert > 1:
        if config.model_type not in TYPES:
            raise PlanError(
                asked,
                found=f"a {config.model_type}, which has no experts that are known",
                allowed=f"expert=N for {', '.join(TYPES)}",
                do="leave expert away",
            )
        count = num_experts(config)
        if count < split.expert:
            raise PlanError(
                asked,
                found=f"{count} experts",
                allowed=f"expert=1 to expert={count}: an expert stays whole",
                do=f"use expert={count} and tensor for the rest",
            )
    if config.model_type == "deepseek_v3" and split.tensor > 1:
        raise PlanError(
            asked,
            found="attention over a latent that all heads share, which no table cuts",
            allowed="expert=N",
            do=f"use expert={split.units}",
        )
    cut = split.pipeline > 1 or split.context > 1
    if config.model_type in TYPES and cut and getattr(config, "output_router_logits", False):
        raise PlanError(
            asked,
            found="output_router_logits: the auxiliary loss needs the routers of all layers, for all tokens",
            allowed="pipeline=1 and context=1, or a config with output_router_logits=false",
            do="use expert=N or tensor=N",
        )


def num_experts(config: Any) -> int:
    """Of a layer, those that all tokens share left out."""
    found = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return int(found or getattr(config, "n_routed_experts", 0) or 0)
