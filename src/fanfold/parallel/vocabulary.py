"""The word embeddings and the output head, tied or not: rows of the vocabulary are cut where the modules are plain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fanfold.parallel.layers import Embedding, Head
from fanfold.parallel.mesh import shares
from fanfold.parallel.weights import Cut

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.parallel.comm import Comm
    from fanfold.parallel.split import Share


def cut_vocabulary(share: Share, comm: Comm, held: Callable[[str, Any, int, list[int]], Any]) -> None:
    """`held` gives the rank's share of a parameter: (name, tensor, dim, index)."""
    model = share.model
    lookups, head = _lookups(model), output_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    tied = head is not None and any(module.weight is head.weight for module in lookups)
    if tied and not (all(map(_is_plain, lookups)) and type(head) is nn.Linear):
        return
    made: dict[int, Any] = {}
    for module in lookups:
        if not _is_plain(module):
            continue
        rows = shares(module.weight.shape[0], comm.size)[comm.rank]
        name = names[id(module)]
        cut = held(f"{name}.weight", module.weight, 0, list(rows))
        weight = made.setdefault(id(module.weight), cut)
        scale = getattr(module, "embed_scale", 1.0)
        model.set_submodule(name, Embedding(comm, name, weight, rows, module.padding_idx, scale))
    if head is not None and type(head) is nn.Linear:
        every = shares(head.weight.shape[0], comm.size)
        name = names[id(head)]
        index = list(every[comm.rank])
        cut = held(f"{name}.weight", head.weight, 0, index)
        bias = None
        if head.bias is not None:
            bias = held(f"{name}.bias", head.bias, 0, index)
            for other, module in model.named_modules():  # the same bias under another name
                for leaf, parameter in list(module.named_parameters(recurse=False)):
                    if parameter is head.bias and module is not head:
                        module._parameters[leaf] = bias
                        share.cuts[f"{other}.{leaf}"] = Cut(0, index)
        weight = made.get(id(head.weight), cut)
        model.set_submodule(name, Head(comm, name, weight, bias, [len(share) for share in every]))


def _lookups(model: Any) -> list[Any]:
    """The word embeddings: the model's, an encoder's and a decoder's, tied or not."""
    first = model.get_input_embeddings()
    if not isinstance(first, nn.Embedding):
        return []
    every = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "embed_tokens"]
    return [first, *(module for module in every if module is not first and module.weight.shape == first.weight.shape)]


def _is_plain(module: Any) -> bool:
    """A lookup and, as BART has it, a factor behind it."""
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and isinstance(module.embed_scale, float)
    return (type(module) is nn.Embedding or scaled) and module.max_norm is None and not module.scale_grad_by_freq


def output_of(model: Any) -> Any:
    """The output head, or None."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
