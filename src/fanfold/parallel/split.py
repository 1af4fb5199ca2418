"""A rank's share of a model: transformers' own modules, of which those that the family's table names are replaced."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fanfold.errors import PlanError, SafetyError
from fanfold.parallel.comm import Comm
from fanfold.parallel.experts import cut_experts
from fanfold.parallel.families import family_of
from fanfold.parallel.layers import Column, HeadNorm, Row
from fanfold.parallel.pipeline import Stage
from fanfold.parallel.rules import heads_of, index_of
from fanfold.parallel.sequence import Sequence
from fanfold.parallel.sequence_families import STACKS
from fanfold.parallel.stack_sequence import StackSequence
from fanfold.parallel.tensors import Alone
from fanfold.parallel.vocabulary import cut_vocabulary
from fanfold.parallel.weights import Cut, fill, open_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.parallel.mesh import Split
    from fanfold.parallel.rules import Family, Heads
    from fanfold.parallel.shared import SharedGroup

_QUANTISED = "quantization_config"
HeadKind = Literal["own", "none", "causal", "sequence", "token"]
_MAPPINGS = {
    "own": "MODEL_MAPPING",
    "none": "MODEL_MAPPING",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


@dataclass(slots=True)
class Share:
    """One rank's model, and of which tensors it holds what: name -> cut; names that are not there are whole."""

    model: Any
    stage: Stage
    cuts: dict[str, Cut] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the whole tensors
    same: dict[str, list[str]] = field(default_factory=dict)  # name -> all names of a tied tensor
    sequence: Sequence | StackSequence | None = None  # where positions are cut

    def forward(self, **inputs: Any) -> Any:
        """The whole model's output on the last stage, None on the others."""
        if self.sequence is None:
            return self.stage.forward(**inputs)
        return self.sequence.forward(self.stage.forward, **inputs)


def architecture(config: Any, *, head: HeadKind = "own") -> Any:
    """The class of the config's models with this head: as it says itself, none, or of one kind. Raises PlanError."""
    import transformers

    for name in config.architectures or () if head == "own" else ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    classes = getattr(transformers, _MAPPINGS[head])
    if type(config) not in classes:
        raise PlanError(
            f"splitting a {config.model_type}",
            found=f"no class in transformers.{_MAPPINGS[head]}",
            allowed="a model that has such a head",
            do="choose another model",
        )
    return classes[type(config)]


def config_of(folder: str | Path) -> Any:
    """Raises: SafetyError for remote code, PlanError for quantised weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if getattr(config, "auto_map", None) and not hasattr(config, "model_type"):
        raise SafetyError(
            f"loading {folder}",
            found="it needs Python code that comes with the model",
            allowed="architectures that transformers itself has",
            do="choose another checkpoint",
        )
    if getattr(config, _QUANTISED, None):
        raise PlanError(
            f"splitting {folder}",
            found="quantised weights",
            allowed="float32, bfloat16, float16",
            do="use the unquantised checkpoint",
        )
    return config


def load_share(
    folder: str | Path,
    comm: Comm,
    dtype: Any,
    *,
    split: Split | None = None,
    world: SharedGroup | None = None,
    head: HeadKind = "own",
    context: Comm | None = None,
    expert: Comm | None = None,
) -> Share:
    """The rank's share of the checkpoint; nothing else of it is read or held.

    `comm`: the ranks that share layers. `world`: all ranks, where there are pipeline stages. `context`: the ranks that
    share a sequence, where it is cut; `expert`: those that hold a layer's experts. `head`: as for `architecture`.
    """
    config = config_of(folder)
    model = empty_model(config, architecture(config, head=head), dtype)
    sequence: Sequence | StackSequence | None = None
    if split is not None and context is not None and context.size > 1:
        kind = StackSequence if config.model_type in STACKS else Sequence
        sequence = kind(model, context, split.context_method)
    share = cut_model(model, comm, expert)
    share.sequence = sequence
    stages, width = (split.pipeline, split.width) if split else (1, comm.size)
    rank = 0 if world is None else world.rank
    share.stage = Stage(share.model, rank // width, stages, world, width)
    share.stage.cut(share.shapes)
    fill(share, open_files(Path(folder), str(folder)), dtype, str(folder))
    if (Path(folder) / "generation_config.json").exists() and share.model.can_generate():
        from transformers import GenerationConfig

        share.model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    register_gradients(share, comm)
    if sequence is not None:
        sequence.sum_gradients()
    return share


def empty_model(config: Any, cls: Any, dtype: Any) -> Any:
    """The model with parameters on the meta device and true buffers."""
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), _parameters_on_meta():
            model = cls(copy.deepcopy(config))
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    with torch.no_grad():
        for module in model.modules():  # buffers as from_pretrained makes them, whatever the dtype of the weights
            model._init_weights(module)
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    real = nn.Module.register_parameter

    def register(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        real(module, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = real


def cut_model(model: Any, comm: Comm, expert: Comm | None = None) -> Share:
    """Replace what the family's table names. The model may hold weights, which are cut then, or be on meta."""
    share = Share(model, Stage(model, 0, 1, None, comm.size))
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        share.shapes[name] = tuple(parameter.shape)
        by_tensor.setdefault(id(parameter), []).append(name)
    for names in by_tensor.values():
        share.same |= dict.fromkeys(names, names)
    cut_experts(share, comm, expert or Comm(Alone()))
    if comm.size == 1:
        return share
    family = family_of(model.config)
    heads = heads_of(model.config, comm.rank, comm.size)
    if any(kind == "head_norm" for kind, _ in family.rules.values()) and heads.replicated:
        raise PlanError(
            f"--layout tensor={comm.size}",
            found=f"{heads.num_kv} key-value heads, normalised together",
            allowed=f"tensor=1 to tensor={heads.num_kv}",
            do=f"use tensor={heads.num_kv}",
        )
    cutter = _Cutter(share, comm, heads)
    replaced = 0
    for name, module in list(model.named_modules()):
        rule = _rule_for(family, name, module)
        if rule is not None:
            cutter.replace(name, module, *rule)
            replaced += 1
        if any(_ends(name, pattern) for pattern in family.attentions):
            _adapt(module, family, heads)
    if not replaced:
        raise PlanError(
            f"splitting a {type(model).__name__}",
            found="none of the layers that its family's table names",
            allowed="models whose layers are named as in transformers",
            do="report this with the model's name",
        )
    cut_vocabulary(share, comm, cutter.held)
    return share


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith("." + pattern)


def _rule_for(family: Family, name: str, module: Any) -> Any:
    """The longest pattern that the name ends with."""
    if next(module.parameters(recurse=False), None) is None:
        return None
    fitting = [pattern for pattern in family.rules if _ends(name, pattern)]
    return family.rules[max(fitting, key=len)] if fitting else None


class _Cutter:
    """Replaces modules, remembering which share of which tensor stays."""

    def __init__(self, share: Share, comm: Comm, heads: Heads) -> None:
        self.share, self.comm, self.heads = share, comm, heads

    def replace(self, name: str, module: Any, kind: str, what: Any) -> None:
        comm = self.comm
        if kind == "sum_gradient":
            return
        weight = module.weight
        if kind == "lookup":  # one column a head: no rank needs another's
            index = index_of(what, self.heads, weight.shape[1], comm.rank, comm.size)
            module.weight = self.held(f"{name}.weight", weight, 1, index)
            return
        if kind == "head_norm":
            index = index_of(what, self.heads, weight.shape[0], comm.rank, comm.size)
            eps = getattr(module, "variance_epsilon", None) or module.eps
            held = self.held(f"{name}.weight", weight, 0, index)
            self._set(name, HeadNorm(comm, name, held, weight.shape[0], eps))
            return
        transposed = type(module).__name__ == "Conv1D"
        outputs, inputs = (1, 0) if transposed else (0, 1)
        dim = outputs if kind == "column" else inputs
        index = index_of(what, self.heads, weight.shape[dim], comm.rank, comm.size)
        held = self.held(f"{name}.weight", weight, dim, index)
        bias = getattr(module, "bias", None)
        if bias is not None and kind == "column":
            bias = self.held(f"{name}.bias", bias, 0, index)
        layer = Column if kind == "column" else Row
        self._set(name, layer(comm, name, held, bias, transposed=transposed))

    def held(self, name: str, tensor: Any, dim: int, index: list[int]) -> Any:
        """The rank's share of a parameter, as a parameter of its own."""
        self.share.cuts[name] = Cut(dim, index)
        where = torch.tensor(index, device=tensor.device)
        return nn.Parameter(tensor.detach().index_select(dim, where), requires_grad=tensor.requires_grad)

    def _set(self, name: str, module: Any) -> None:
        self.share.model.set_submodule(name, module)


def register_gradients(share: Share, comm: Comm) -> None:
    """Gradients are summed where ranks hold the same rows of a parameter, or where it sees a rank's heads only."""
    if comm.size == 1:
        return
    family = family_of(share.model.config)
    for name, parameter in share.model.named_parameters():
        module = name.rpartition(".")[0]
        rule = next((family.rules[p] for p in sorted(family.rules, key=len, reverse=True) if _ends(module, p)), None)
        if rule is None:
            continue
        kind, what = rule
        cut = share.cuts.get(name)
        if kind == "sum_gradient":
            comm.sum_gradient(parameter, name)
        elif kind == "column" and cut is not None and cut.dim == 0 and _overlaps(share, what, name, comm):
            comm.sum_gradient(parameter, name, (cut.index, share.shapes[name][0]))


def _overlaps(share: Share, what: Any, name: str, comm: Comm) -> bool:
    """Whether any row of the tensor is held by two ranks: the same answer on every rank."""
    seen: set[int] = set()
    for rank in range(comm.size):
        mine = index_of(what, heads_of(share.model.config, rank, comm.size), share.shapes[name][0], rank, comm.size)
        if not seen.isdisjoint(mine):
            return True
        seen.update(mine)
    return False


def _adapt(module: Any, family: Family, heads: Heads) -> None:
    """An attention module counts the heads that it has, and gets inputs for those."""
    counts = {
        "heads": len(heads.heads),
        "kv": len(heads.kv),
        "groups": len(heads.heads) // len(heads.kv),
        "features": len(heads.heads) * heads.size,
    }
    for name, what in family.attributes.items():
        holder, _, leaf = name.rpartition(".")
        if holder:
            own = copy.copy(getattr(module, holder))
            setattr(own, leaf, counts[what])
            setattr(module, holder, own)
        elif hasattr(module, leaf):
            setattr(module, leaf, counts[what])
    if family.head_inputs:

        def take(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            for name in family.head_inputs:
                if torch.is_tensor(kwargs.get(name)):
                    kwargs = {**kwargs, name: _of_heads(kwargs[name], heads)}
            return args, kwargs

        module.register_forward_pre_hook(take, with_kwargs=True)


def _of_heads(x: torch.Tensor, heads: Heads) -> torch.Tensor:
    """[B * heads, ...] or [B, heads, ...] -> those of this rank; [B, 1, ...] stays."""
    mine = slice(heads.heads.start, heads.heads.stop)
    if x.dim() == 3:
        rows = x.view(-1, heads.num_heads, *x.shape[1:])[:, mine]
        return rows.reshape(-1, *x.shape[1:])
    return x[:, mine] if x.shape[1] == heads.num_heads else x
