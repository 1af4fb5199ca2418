"""Every number of the cost model that is not in a datasheet or the catalogue, and where each came from.

Calibration sources (never reported as zero-shot): FlashAttention-2 table 1 (FA2), Korthikanti 2022 table 4 (K4),
published collectives (C), and single published runs (M: Llama 3 table 4, Nemotron-4, MT-NLG, MLPerf Eos).
None was fitted by a procedure to a row that docs/validation.md reports as zero-shot; which ones were set with such rows
in view, docs/validation.md says.
"""

from __future__ import annotations

# Share of the datasheet's dense peak that large matrix products sustain in training, whole waves, no launch cost.
# Ampere: FA2, 1.3B and 2.7B with FlashAttention-2, and the GEMM share of K4. Hopper: M, Llama 3 405B and
# Nemotron-4 340B; a device at its power limit clocks down, which the datasheet's peak leaves out.
MATMUL_EFFICIENCY = {
    "Volta": 0.80,
    "Ampere": 0.78,
    "Ada": 0.75,
    "Turing": 0.55,
    "Hopper": 0.67,
    "Blackwell": 0.67,
    "Blackwell Ultra": 0.67,
    "CDNA2": 0.60,
    "CDNA3": 0.55,
    "CDNA4": 0.55,
    "TPU": 0.75,
}
MATMUL_EFFICIENCY_OTHER = 0.70
# Devices with less power per FLOP than these clock down; MATMUL_EFFICIENCY stands for these.
POWER_REFERENCE = {"Ampere": "A100-80GB-SXM", "Hopper": "H100-80GB-SXM", "Ada": "L40S"}
# fp8 products gain less than the peak says: scaling, higher power per FLOP. M: MLPerf Eos GPT-3.
FP8_EFFICIENCY = 0.80  # times the above

# Tiles (rows, columns) of common GEMM kernels, and what each reaches of the largest one: a smaller tile reads more
# per product (CUTLASS, efficient GEMM). K1 is the depth that filling the pipeline and writing the result costs.
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.97), (128, 64, 0.85), (64, 128, 0.85), (64, 64, 0.70))
FILL_DEPTH = 128
# Up to so many rows a product is a sum of vectors, on units that reach a tenth of the peak.
VECTOR_ROWS, VECTOR_EFFICIENCY = 8, 0.1
SPLIT_DEPTHS = (1, 2, 4, 8)  # a deep product with few tiles is cut along K

# Share of the memory bandwidth that streaming kernels reach. K4: layer norm and dropout, with and without
# sequence parallelism, differ by 0.5 ms.
MEMORY_EFFICIENCY = 0.85

# FlashAttention: share of the sustained product rate, (forward, backward), heads of 128. FA2: 8,192 against 2,048
# tokens on Ampere; its section 4 gives 335 TFLOP/s for both ways together on Hopper. "Current" is cuDNN's on Hopper,
# between FlashAttention-2 and -3. FlashAttention-1 against 2: FA2 again.
FLASH_2 = {"Ampere": (0.72, 0.62), "Hopper": (0.50, 0.45)}
FLASH_CURRENT = {"Ampere": (0.72, 0.62), "Hopper": (0.60, 0.52), "Blackwell": (0.60, 0.52)}
FLASH_OTHER = (0.55, 0.45)
FLASH_1_SHARE = 0.62
FLASH_BACKWARD_FLOPS = 2.5  # five products instead of two: FA2, section 3.1

# Shortest useful run of a kernel on the device.
KERNEL_S = 3e-6
# What the host needs to issue one layer in eager PyTorch: 0.57 ms forward and 0.35 ms backward for a GPT-2 layer on
# a CPU (measured, docs/log.md), and 40 and 60 kernels launched at 5 us.
HOST_FORWARD_S = 0.8e-3
HOST_BACKWARD_S = 0.65e-3
# Checkpointing a layer (re-entrant autograd, random state kept and put back) beside its second forward, measured the
# same way: backward grows from 0.33 to 1.38 ms, forward by 0.08, of which the second forward is 0.41.
HOST_CHECKPOINT_S = 0.7e-3
HOST_COLLECTIVE_S = 40e-6  # issuing a collective from an autograd function, measured the same way (docs/log.md)
# Selective recomputation where FlashAttention already leaves no scores to recompute: every second product again
# (torchtitan's policy, its documentation).
SELECTIVE_SHARE = 0.5

# Collectives (C): start-up per step of a ring, NCCL's kernel included, and what a network card reaches.
ALPHA_WITHIN_S = 10e-6
ALPHA_ACROSS_S = 20e-6
NETWORK_EFFICIENCY = 0.9
# Where a link's all-reduce rate was not published: its share of the one-way rate (A100: 230 of 300).
LINK_EFFICIENCY = 0.77

# Memory: contexts of CUDA and NCCL as nvidia-smi shows them (1.3 to 1.6 GB), and what a caching allocator
# reserves above what it has handed out (2 to 6 % of what comes and goes).
CONTEXT_BYTES = 1.5e9
# A device sold with 80 GB has 80 GiB, of which the driver keeps a little: nvidia-smi shows 79.2 to 79.6.
USABLE_MEMORY = 0.985
ALLOCATOR_SLACK = 0.04

# Inference. Kernels beside the products in one layer (norms, positions, cache, attention, activation), replayed from
# a graph. What a serving engine adds to a step, and to it per sequence: schedulers in Python need milliseconds (the
# vLLM 0.6 notes put scheduling and sampling beside the device's work), runtimes in C++ a fraction. Round numbers.
LAYER_KERNELS = 8
ENGINE_S = {"python": (2e-3, 1e-4), "native": (0.5e-3, 1e-5), "eager": (2e-3, 1e-4)}
EAGER_LAYER_S = 0.3e-3  # issuing one layer without gradients and without graphs: a third of HOST_FORWARD_S
PREFILL_S = 5e-3  # from a request's arrival to its step, and back: tokenising, queueing, the first token's way out
CACHE_EFFICIENCY = 0.75  # of streaming: keys and values lie in pages
MEMORY_FOR_CACHE = 0.90  # of what weights leave
MOST_SEQUENCES = 2048
"""Sequences an engine runs at once at most."""

# Measured over predicted, 10th and 90th percentile of the zero-shot rows of docs/validation.md.
INTERVAL = {"train": (0.92, 1.28), "infer": (0.80, 1.38)}
