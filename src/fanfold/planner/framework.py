"""What a training framework overlaps and fuses: one record a generation, so that published rows can be compared."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """Defaults are a current one: FlashAttention, fused kernels, communication behind computation."""

    name: str = "current"
    flash: int = 3  # FlashAttention version, 3 a current one, 0: scores are written out
    fused: bool = True  # bias, activation, dropout and residual in one kernel each
    compiled: bool = False  # a compiler fuses what is between the products (XLA)
    dropout: bool = False
    sequence_parallel: bool = True
    tensor_hidden: tuple[float, float] = (0.6, 0.8)  # share of tensor communication behind products: fwd, bwd
    data_overlap: bool = True
    pipeline_overlap: bool = True
    scatter_gather: bool = True  # a tensor group sends a stage's border in parts
    gradient_bytes: int = 4
    host: float = 1.0  # what the host needs to issue a layer, of eager PyTorch
    interleaves: bool = True
    sharded_vocabulary: bool = True


CURRENT = Framework()
_MEGATRON_2021 = Framework(
    name="Megatron-LM 2021",
    flash=0,
    dropout=True,
    sequence_parallel=False,
    tensor_hidden=(0.0, 0.0),
    data_overlap=False,
    pipeline_overlap=False,
    gradient_bytes=2,
)
_MEGATRON_2022 = replace(
    _MEGATRON_2021, name="Megatron-LM 2022", tensor_hidden=(0.0, 0.5), sequence_parallel=True, gradient_bytes=4
)
_FSDP = Framework(
    name="PyTorch FSDP", fused=False, sequence_parallel=False, tensor_hidden=(0.0, 0.0), flash=2, gradient_bytes=2
)
_KNOWN: tuple[tuple[str, Framework], ...] = (
    (r"megatron-lm 2022 no sp", replace(_MEGATRON_2022, sequence_parallel=False)),
    (r"megatron-lm 2022", _MEGATRON_2022),
    (r"megatron-lm 2021|megatron-lm v1|gpt-neox|megatron-lm 20(19|20)", _MEGATRON_2021),
    (r"megatron-deepspeed", replace(_MEGATRON_2021, name="Megatron-DeepSpeed", interleaves=False)),
    (
        r"deepspeed.*zero",
        replace(_MEGATRON_2021, name="DeepSpeed ZeRO", data_overlap=True, scatter_gather=False),
    ),
    (r"no flashattention", replace(_MEGATRON_2022, name="Megatron without FlashAttention", sequence_parallel=False)),
    (r"flashattention-1", replace(_FSDP, name="FlashAttention-1", flash=1, fused=True)),
    (r"flashattention-2", replace(_FSDP, name="FlashAttention-2", fused=True)),
    (r"maxtext|paxml|jax|t5x", Framework(name="JAX", compiled=True, sequence_parallel=True, host=0.0)),
    (r"llm-foundry|composer", replace(_FSDP, flash=1)),  # attn_impl: triton, a port of FlashAttention-1
    (r"torchtitan.*compile|compile.*(fsdp|torchtitan)|fsdp.*compile", replace(_FSDP, compiled=True)),
    (r"fsdp|torchtitan", _FSDP),
    (
        r"ddp|bert",
        replace(_FSDP, name="PyTorch DDP", flash=0, dropout=True, fused=True, host=0.7),
    ),
    (r"nemo", replace(CURRENT, name="NeMo", gradient_bytes=2)),  # its recipes reduce gradients in 16 bits
    (r"megatron|mcore", CURRENT),
)


def framework(words: str) -> Framework:
    """The generation that the words of a table name; a current one where they name none."""
    text = words.lower()
    for pattern, found in _KNOWN:
        if re.search(pattern, text):
            return found
    return CURRENT
