"""One layout on one cluster: seconds, bytes, what they are made of, and what bounds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.planner.constants import CONTEXT_BYTES, INTERVAL
from fanfold.planner.inference import Load, Serving, cache_bytes_per_token, most_sequences, serve, weight_bytes
from fanfold.planner.memory import memory
from fanfold.planner.training import Training, step
from fanfold.quantity import format_bytes

if TYPE_CHECKING:
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """`terms` are seconds of a step and add up to it; `interval` holds four of five measurements."""

    layout: dict[str, Any]
    named: str  # the layout as text
    step_time_s: float | None
    tokens_per_s: float
    ttft_s: float | None
    itl_s: float | None
    memory_bytes_per_device: float
    memory_terms: dict[str, float]
    fits: bool
    mfu: float
    terms: dict[str, float]
    bound: str
    interval: tuple[float, float]  # of step_time_s, or of tokens_per_s where tokens are generated

    def record(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "layout": self.layout,
            "step_time_s": self.step_time_s,
            "tokens_per_s": self.tokens_per_s,
            "ttft_s": self.ttft_s,
            "itl_s": self.itl_s,
            "memory_bytes_per_device": round(self.memory_bytes_per_device),
            "fits": self.fits,
            "mfu": self.mfu,
            "terms": self.terms,
            "bound": self.bound,
            "interval": list(self.interval),
        }


def predict(workload: Training | tuple[Serving, Load], cluster: Cluster, layout: Degrees) -> Prediction:
    """The workload on the cluster in that layout; PlanError where the layout cannot be.

    A workload is a Training, or a Serving with its Load, whose layout is data (replicas) and tensor.
    """
    if isinstance(workload, Training):
        check(workload, cluster, layout)
        return _training(workload, cluster, layout)
    serving, load = workload
    return _serving(serving, load, cluster, layout)


def _training(training: Training, cluster: Cluster, degrees: Degrees) -> Prediction:
    found = step(training, cluster, degrees)
    held = memory(training, cluster, degrees)
    tokens = training.global_batch * training.length
    flops = 3 * training.model.forward_flops_per_token(training.length, masked=False) * tokens
    low, high = INTERVAL["train"]
    terms = {name: seconds for name, seconds in found.terms.items() if seconds}
    return Prediction(
        layout=degrees.record(),
        named=str(degrees),
        step_time_s=found.seconds,
        tokens_per_s=tokens / found.seconds,
        ttft_s=None,
        itl_s=None,
        memory_bytes_per_device=held.total,
        memory_terms=held.record(),
        fits=held.total <= cluster.memory_bytes,
        mfu=flops / (found.seconds * degrees.devices * cluster.accelerator.peak(training.precision)),
        terms=terms,
        bound=bound(terms),
        interval=(found.seconds * low, found.seconds * high),
    )


def _serving(serving: Serving, load: Load, cluster: Cluster, degrees: Degrees) -> Prediction:
    from dataclasses import replace

    one = replace(serving, tensor=degrees.tensor)
    model, replicas = serving.model, degrees.data
    if model.heads % degrees.tensor:
        raise _undivided("heads", model.heads, "tensor", degrees.tensor)
    share = load
    if load.concurrency is not None:
        share = replace(load, concurrency=max(1.0, load.concurrency / replicas))
    if load.requests_per_s is not None:
        share = replace(load, requests_per_s=load.requests_per_s / replicas)
    context = load.input_tokens + load.output_tokens
    room = most_sequences(one, cluster, context)
    served = serve(one, cluster, share)
    held = served.sequences * context * cache_bytes_per_token(one)
    parts = {"weights": weight_bytes(one), "cache": held, "runtime": CONTEXT_BYTES}
    tokens = replicas * served.requests_per_s * load.output_tokens
    per_token = model.forward_flops_per_token(context) * (1 + load.input_tokens / max(1, load.output_tokens))
    low, high = INTERVAL["infer"]
    terms = {name: seconds for name, seconds in served.terms.items() if seconds}
    return Prediction(
        layout={"data": replicas, "tensor": degrees.tensor, "sequences": round(served.sequences)},
        named=f"data={replicas} tensor={degrees.tensor}, {round(served.sequences)} sequence(s) together",
        step_time_s=None,
        tokens_per_s=tokens,
        ttft_s=served.ttft_s,
        itl_s=served.itl_s,
        memory_bytes_per_device=sum(parts.values()),
        memory_terms=parts,
        fits=room >= 1 and sum(parts.values()) <= cluster.memory_bytes,
        mfu=tokens * per_token / (degrees.devices * cluster.accelerator.peak(serving.precision)),
        terms=terms,
        bound=bound(terms),
        interval=(tokens * low, tokens * high),
    )


_BOUNDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory": "memory-bound operations",
    "launch": "the host, which issues kernels slower than the device runs them",
    "tensor": "communication inside layers (tensor)",
    "context": "communication of keys and values (context)",
    "expert": "communication of tokens to experts",
    "pipeline": "sending activations between stages",
    "bubble": "stages that wait (pipeline bubble)",
    "data": "communication of gradients and weights (data, ZeRO)",
    "optimizer": "the optimiser's update",
    "head": "the last stage's vocabulary",
    "cache": "reading keys and values from memory",
    "other": "small kernels",
    "engine": "the serving engine's own work",
}


def bound(terms: dict[str, float]) -> str:
    """What takes most, in words."""
    name = max(terms, key=terms.__getitem__)
    return f"{_BOUNDS[name]}, {terms[name] / sum(terms.values()):.0%} of the step"


def meaning(name: str) -> str:
    return _BOUNDS[name]


def check(training: Training, cluster: Cluster, degrees: Degrees) -> None:
    """PlanError where a layout cannot be: its product, its divisions, its batch."""
    model = training.model
    if degrees.devices != cluster.devices:
        product = f"{degrees.data} x {degrees.tensor} x {degrees.pipeline} x {degrees.context}"
        raise PlanError(
            f"layout {degrees}",
            found=f"data x tensor x pipeline x context = {product} = {degrees.devices}",
            allowed=f"a product of {cluster.devices}, the number of devices",
            do="change one of them, or leave one away to have it chosen",
        )
    if model.heads % degrees.tensor:
        raise _undivided("heads", model.heads, "tensor", degrees.tensor)
    if degrees.pipeline > model.layers:
        raise _undivided("layers", model.layers, "pipeline", degrees.pipeline)
    if degrees.interleave > 1 and model.layers % (degrees.pipeline * degrees.interleave):
        raise _undivided("layers", model.layers, "pipeline x interleave", degrees.pipeline * degrees.interleave)
    if degrees.expert > 1 and (not model.experts or model.experts % degrees.expert):
        raise _undivided("experts", model.experts, "expert", degrees.expert)
    if training.global_batch < degrees.data * degrees.micro_batch:
        raise PlanError(
            f"--global-batch {training.global_batch}",
            found=f"data x micro-batch = {degrees.data} x {degrees.micro_batch} = {degrees.data * degrees.micro_batch}",
            allowed="a batch of at least that many sequences",
            do="raise the batch, or use more tensor or pipeline and less data",
        )


def _undivided(what: str, count: int, method: str, degree: int) -> PlanError:
    divisors = [n for n in range(1, min(count, 1024) + 1) if count and count % n == 0]
    return PlanError(
        f"{method}={degree}",
        found=f"{count} {what}, which {degree} does not divide",
        allowed=f"{method} among " + ", ".join(map(str, divisors[:16])),
        do="choose one of these",
    )


def too_big(what: str, need: float, have: float, do: str) -> PlanError:
    return PlanError(
        what,
        found=f"at least {format_bytes(need)} on a device, {format_bytes(need - have)} too much",
        allowed=f"{format_bytes(have)} on a device",
        do=do,
    )
