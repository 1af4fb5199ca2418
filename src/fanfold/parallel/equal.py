"""Whether a split model is the whole one: outputs, loss and every gradient.

Relative error of a tensor: the largest difference over the largest value of the whole model's. Of a gradient, the
values are those of its own tensor, or a millionth of the largest gradient where all of its own are smaller: some are
zero by mathematics (a key's bias) and hold rounding errors only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fanfold.parallel.experts import loads_of
from fanfold.parallel.experts_families import TYPES as EXPERT_TYPES
from fanfold.parallel.inputs import inputs_for, labels_for
from fanfold.parallel.split import load_share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from fanfold.parallel.comm import Comm
    from fanfold.parallel.mesh import Split
    from fanfold.parallel.shared import SharedGroup

FLOAT64_PROMISE = 1e-10
CASTS_PROMISE = 1e-6  # where the model's own code computes in float32 inside
# Their norms, rotations or softmax cast to float32 whatever the weights are.
CASTS = ("gptj", "olmo2", "qwen3", "bloom", "falcon")
CASTS_OVER_POSITIONS = ("gemma",)  # its norms sum their gradient over positions in float32
_FLOOR = 1e-6


def compare(
    folder: Path,
    comm: Comm,
    dtype: torch.dtype,
    *,
    gradients: bool,
    skip: int | None = None,
    split: Split | None = None,
    world: SharedGroup | None = None,
    context: Comm | None = None,
    expert: Comm | None = None,
) -> dict[str, Any]:
    """On one rank: its share against the whole model, both from `folder`. All ranks call it at once.

    `skip`: the number of a collective that does nothing, to see whether its lack is found.
    """
    ledger = comm.ledger
    ledger.begin(skip)
    share = load_share(folder, comm, dtype, split=split, world=world, context=context, expert=expert)
    stage = share.stage
    options = {}
    if share.model.config.model_type in EXPERT_TYPES:
        # torch has no grouped product in float64: experts one after the other
        options = {"experts_implementation": "eager"}
        share.model.set_experts_implementation("eager")
    whole = type(share.model).from_pretrained(str(folder), dtype=dtype, local_files_only=True, **options).eval()
    inputs = inputs_for(whole)
    found = _outputs(share.model, inputs, share.forward)
    expected = _outputs(whole, inputs, whole)
    assert expected is not None
    record: dict[str, Any] = {
        "max_rel_logits": 0.0 if found is None else _largest(map(relative, found[2], expected[2])),
        "max_rel_loss": 0.0 if found is None else relative(found[1], expected[1]),
        "bitwise": found is None or torch.equal(found[0], expected[0]),
        "max_rel_grad": 0.0,
        "worst_grad_name": "",
        "grads": [],
        "reference": type(whole).__name__,
    }
    if gradients:
        stage.backward(None if found is None else found[1])
        expected[1].backward()
        record |= _gradients(share, whole)
    ledger.skip = None
    record["skipped"] = ledger.skipped
    record["collectives"] = dict(ledger.calls)
    record["bytes"] = dict(ledger.bytes)
    record["expert_load"] = loads_of(share.model, context)
    return record


def _outputs(
    model: Any, inputs: dict[str, torch.Tensor], forward: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]] | None:
    """Logits, the loss over them, and all that is compared: an encoder's hidden states, too, where there are any.

    Without a head, hidden states and their product with fixed random numbers. None on a pipeline stage that is not the
    last.
    """
    heads = ("ForCausalLM", "ForMaskedLM", "LMHeadModel", "ForConditionalGeneration")
    if type(model).__name__.endswith(heads):
        out = forward(**inputs, labels=labels_for(inputs))
        return None if out is None else (out.logits, out.loss, _compared(out.logits, out))
    out = forward(**inputs)
    if out is None:
        return None
    values = out.logits if "logits" in out else out.last_hidden_state
    chance = torch.Generator().manual_seed(2)
    weights = torch.randn(values.shape, generator=chance, dtype=torch.float64).to(values.dtype)
    return values, (values * weights).sum(), _compared(values, out)


def _compared(values: torch.Tensor, out: Any) -> list[torch.Tensor]:
    of_encoder = out.get("encoder_last_hidden_state")
    return [values] if of_encoder is None else [values, of_encoder]


def _gradients(share: Any, whole: Any) -> dict[str, Any]:
    theirs = dict(whole.named_parameters(remove_duplicate=False))
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    worst, name_of_worst = 0.0, ""
    compared: list[str] = []
    for name, parameter in share.model.named_parameters(remove_duplicate=False):
        expected = theirs[name].grad
        if (expected is None) != (parameter.grad is None):
            return {"max_rel_grad": math.inf, "worst_grad_name": f"{name} (on one side only)", "grads": compared}
        if expected is None:
            continue
        compared.append(name)
        floor = max(float(expected.abs().max()), _FLOOR * largest)
        cut = share.cuts.get(name)
        if cut is not None:
            expected = cut.of(expected)
        error = float((parameter.grad - expected).abs().max()) / floor if expected.numel() else 0.0
        if not error <= worst:
            worst, name_of_worst = error, name
    every = sum(parameter.grad is not None for parameter in theirs.values())
    return {"max_rel_grad": worst, "worst_grad_name": name_of_worst, "grads": compared, "num_grads_whole": every}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def worst_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of all ranks': the largest errors, NaN above all."""
    merged = dict(records[0])
    merged["num_grads"] = len({name for record in records for name in record["grads"]})
    for record in records[1:]:
        for key in ("max_rel_logits", "max_rel_loss"):
            if not record[key] <= merged[key]:
                merged[key] = record[key]
        if not record["max_rel_grad"] <= merged["max_rel_grad"]:
            merged["max_rel_grad"], merged["worst_grad_name"] = record["max_rel_grad"], record["worst_grad_name"]
        merged["bitwise"] = merged["bitwise"] and record["bitwise"]
    return merged


def largest_error(record: dict[str, Any]) -> float:
    """Of outputs, loss and gradients; infinite where one is not a number."""
    largest = _largest(float(record[key]) for key in ("max_rel_logits", "max_rel_loss", "max_rel_grad"))
    return math.inf if math.isnan(largest) else largest


def _largest(errors: Iterable[float]) -> float:
    """NaN where one is NaN: `max` depends on where it stands."""
    every = list(errors)
    return next(filter(math.isnan, every), max(every))


def promise_of(model_type: str, dtype: str, *, context: int = 1) -> float:
    """The largest relative error that is allowed in the dtype; context: over how many units a sequence is cut."""
    if dtype == "float64":
        casts = model_type in CASTS or (context > 1 and model_type in CASTS_OVER_POSITIONS)
        return CASTS_PROMISE if casts else FLOAT64_PROMISE
    return 1e-3 if dtype == "float32" else 0.1
