"""Time and memory of a job on this machine's cores: its batches, operator by operator, at the rates that were measured.

Shapes: T tokens of a batch (rows x length, padding included), h width, f feed-forward width, A heads, d head width.
A layer is its products [T, k] x [k, n], its attention over rows x A x length^2 pairs, its activation over [T, f], its
norms, and passes over memory at the rate of an addition: residuals, and copies that make heads contiguous.
A job is: imports, then the first window's tokens, then batches on all units, then the output (docs/planning.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fanfold.machine.rates import Rates
    from fanfold.plan.model import Layer, Model

# Operators that a layer issues beside its products and attention: reshapes, masks, module calls (transformers, BERT).
_CALLS_PER_LAYER = 24
_RESIDUALS = 2.0  # additions of [T, h]
_HEADS_COPIED = 1.0  # [T, h], behind attention
_RMS_PASSES = 4.0  # square, mean, scale, weight: each its own pass in eager mode
_ROTARY_PASSES = 5.0  # over queries and keys: halves turned, two products, a sum
_EMBED_PASSES = 5.0  # over [T, h]: three tables gathered and added
_POOL_PASSES = 3.0  # over [T, h]: weighted, summed, divided
_EPOCH = 1e-9

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "silu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
# Of a job around its batches, in seconds of one core and bytes, on the machine of docs/log.md.
FORK_S = 0.15  # a unit forked, its threads held and looked at
LOAD_S = 0.25  # transformers makes the modules and maps the weights
TOKENIZER_S = 0.25  # its file read
FINISH_S = 0.1  # summary, hashes, folders flushed
LEASE_S = 0.012  # a piece's file written, reported, committed and logged
OPENED_BYTES = 14e6  # a tokenizer of 30,000 words, the model's modules
TOKEN_BYTES = 400  # of a window while it is tokenised: encodings with offsets and words, then lists of numbers
# Blocks of MMAP_BYTES and more are mapped and returned (engine/supervisor.py sets the threshold). Smaller ones come
# from malloc's heap, where a hole serves blocks no larger than itself: batches of other shapes leave holes. Measured
# over 40 shapes at width 384: 11 blocks of [T, h] after the first, 24 after the last; 16 MB where all are mapped.
MMAP_BYTES = 4 << 20
HEAP_BYTES, FIRST_BLOCKS, BLOCKS_A_SHAPE, MOST_BLOCKS = 16e6, 11.0, 0.5, 24.0
ROW_WRITE_S = 4e-6  # a row's result and kept columns into the part


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model, and what its config says of operators that are not products."""

    model: Model
    activation: str = "gelu"
    rms: bool = False
    weights_bytes: int

    @property
    def widest(self) -> int:
        """The widest activation of a layer."""
        return max(max(layer.ffn, self.model.hidden) for layer in _layers(self.model))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to compute: batches of one sample of the input, and how often the sample goes into it."""

    batches: tuple[tuple[int, int], ...]  # rows, length
    scale: float
    rows: int
    prepare_s: float  # of one core, for all rows
    first_prepare_s: float  # of it, for the first window: nothing is computed before
    windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes of a job's processes before any model: of the command, of the zygote, of a unit for itself."""

    parent_bytes: int
    zygote_bytes: int
    unit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPrediction:
    """Expected time and memory; `terms` are seconds of the job's elapsed time and add up to it."""

    elapsed_s: float
    memory_bytes: int
    terms: dict[str, float]
    operators: dict[str, float]  # shares of computing

    def record(self) -> dict[str, Any]:
        """Plain values, as run.json stores them."""
        return {
            "elapsed_s": round(self.elapsed_s, 3),
            "memory_bytes": self.memory_bytes,
            "terms": {name: round(seconds, 3) for name, seconds in self.terms.items()},
            "operators": {name: round(share, 4) for name, share in self.operators.items()},
        }


def local_model(model: Model, config: dict[str, Any], weights_bytes: int) -> LocalModel:
    """From the config.json's own words for the activation and the norm."""
    word = str(config.get("hidden_act") or config.get("activation_function") or config.get("activation") or "gelu")
    rms = "rms_norm_eps" in config or config.get("model_type") in ("t5", "mt5", "umt5")
    return LocalModel(model=model, activation=_ACTIVATIONS.get(word, "gelu"), rms=rms, weights_bytes=weights_bytes)


def batch_terms(
    rates: Rates, local: LocalModel, rows: int, length: int, *, busy: int = 1, threads: int = 1
) -> dict[str, float]:
    """Seconds of one batch on one unit while `busy` units compute, by kind of operator."""
    model, tokens = local.model, rows * length

    def passes(width: float) -> float:
        return rates.seconds("add", (tokens, max(1, round(width))), busy=busy, threads=threads)

    terms = dict.fromkeys(("products", "attention", "elementwise", "host"), 0.0)
    for block in model.blocks:
        layer, count = block.layer, block.count
        for k, n, times in _products(layer):
            terms["products"] += count * times * rates.seconds("gemm", (tokens, k, n), busy=busy, threads=threads)
        moved = _RESIDUALS * passes(model.hidden)
        for seen in layer.attention:
            share = seen.keys_seen(length) / length if seen.window is not None else 1.0
            shape = (rows, seen.heads, length, seen.head_dim)
            terms["attention"] += count * share * rates.seconds("attention", shape, busy=busy, threads=threads)
            moved += _HEADS_COPIED * passes(seen.heads * seen.value_dim)
            if local.rms:
                moved += _ROTARY_PASSES * passes((seen.heads + seen.kv_heads) * seen.head_dim)
        active = rates.seconds(local.activation, (tokens, max(1, layer.ffn)), busy=busy, threads=threads)
        if layer.gated:
            active += passes(layer.ffn)
        norm = (
            _RMS_PASSES * passes(model.hidden)
            if local.rms
            else rates.seconds("layer_norm", (tokens, model.hidden), busy=busy, threads=threads)
        )
        terms["elementwise"] += count * (moved + active + layer.norms * norm)
        terms["host"] += count * _CALLS_PER_LAYER * rates.issue_s
    terms["elementwise"] += (_EMBED_PASSES + _POOL_PASSES) * passes(model.hidden)
    return terms


def predict_local(
    rates: Rates, local: LocalModel, work: Work, held: Held, *, units: int, threads: int = 1
) -> LocalPrediction:
    """The job on `units` of `threads` each. Units beyond the cores wait for each other."""
    busy = min(units * threads, rates.cores)
    crowd = max(1.0, units * threads / rates.cores)
    sums = dict.fromkeys(("products", "attention", "elementwise", "host"), 0.0)
    for (rows, length), count in _counted(work.batches):
        found = batch_terms(rates, local, rows, length, busy=busy, threads=threads)
        for name, seconds in found.items():
            sums[name] += count * work.scale * seconds
    computing = sum(sums.values())
    num_batches = len(work.batches) * work.scale
    last = max((batch_cost(batch) for batch in work.batches), default=0) / max(
        1, sum(batch_cost(batch) for batch in work.batches)
    )
    load_s = LOAD_S + local.weights_bytes / rates.copy_bytes_per_s
    later_s = max(0.0, work.prepare_s - work.first_prepare_s)
    terms = {
        "start": rates.import_s + FORK_S,
        "prepare": TOKENIZER_S + work.first_prepare_s,
        "load": load_s / units,
        # Units do not end together: on average half of the shortest batch of the last window is waited for.
        "compute": crowd * (computing + later_s) / units + 0.5 * (units > 1) * last * computing / max(1.0, work.scale),
        "output": LEASE_S * num_batches / units + ROW_WRITE_S * work.rows + FINISH_S,
    }
    return LocalPrediction(
        elapsed_s=sum(terms.values()),
        memory_bytes=memory_bytes(local, work, held, units=units),
        terms=terms,
        operators={name: seconds / max(computing, _EPOCH) for name, seconds in sums.items()},
    )


def memory_bytes(local: LocalModel, work: Work, held: Held, *, units: int) -> int:
    """All processes together: weights once, because units map the same file; a batch's activations in every unit."""
    tokens = max((rows * length for rows, length in work.batches), default=0)
    pairs = max((rows * length * length for rows, length in work.batches), default=0)
    # Alive at once in a feed-forward part: input, residual, both sides of the activation; and the mask of pairs.
    alive = 4 * (tokens * 2 * (local.model.hidden + local.widest) + pairs)
    window_tokens = sum(map(batch_cost, work.batches))
    shapes = {batch: 4 * batch_cost(batch) * local.model.hidden for batch in work.batches}
    small = [size for size in shapes.values() if size < MMAP_BYTES]
    blocks = min(MOST_BLOCKS, FIRST_BLOCKS + BLOCKS_A_SHAPE * len(small))
    heap = max(HEAP_BYTES, blocks * max(small, default=0))
    own = held.unit_bytes + OPENED_BYTES + TOKEN_BYTES * window_tokens + heap + alive
    return held.parent_bytes + held.zygote_bytes + local.weights_bytes + round(units * own)


def batch_cost(batch: tuple[int, int]) -> int:
    """Padded tokens."""
    return batch[0] * batch[1]


def _products(layer: Layer) -> Iterable[tuple[int, int, float]]:
    """(inputs, outputs, times) of a layer's products; queries, keys and values are products of their own."""
    for linear in layer.linears:
        if linear.name == "qkv" and layer.attention:
            seen = layer.attention[0]
            kv = (linear.outputs - seen.heads * seen.head_dim) // 2
            yield linear.inputs, seen.heads * seen.head_dim, 1.0
            if kv:
                yield linear.inputs, kv, 2.0
        elif linear.name == "gate_up":
            yield linear.inputs, linear.outputs // 2, 2.0 * linear.chosen
        else:
            yield linear.inputs, linear.outputs, float(linear.chosen)


def _layers(model: Model) -> list[Layer]:
    return [block.layer for block in model.blocks]


def _counted(batches: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    found: dict[tuple[int, int], int] = {}
    for batch in batches:
        found[batch] = found.get(batch, 0) + 1
    return list(found.items())
