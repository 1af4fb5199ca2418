"""How many units with how many threads each: from what was measured of the machine, for one step of the model."""

from __future__ import annotations

from dataclasses import dataclass

from fanfold.quantity import format_bytes

SAME = (
    0.05  # options this close are the same: the one with fewer threads a unit is taken, whose bytes are the default's
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured: products in float32 on one thread and on all allowed cores, and copies on one (read and written)."""

    cores: int
    gemm_one_flop_per_s: float
    gemm_all_flop_per_s: float
    copy_bytes_per_s: float

    def gemm_flop_per_s(self, threads: int) -> float:
        """Between what was measured at one thread and at all cores, in a straight line."""
        if self.cores == 1:
            return self.gemm_one_flop_per_s
        share = (threads - 1) / (self.cores - 1)
        return self.gemm_one_flop_per_s + share * (self.gemm_all_flop_per_s - self.gemm_one_flop_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step of a unit reads once, reads of its own, and computes: `rows` tokens of `flops` each."""

    weights_bytes: int
    own_bytes: int  # keys and values
    rows: int
    flops_per_row: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """`units` of `threads` each, and how many tokens a second they would give together."""

    units: int
    threads: int
    tokens_per_s: float

    def __str__(self) -> str:
        return f"{self.units} x {self.threads} thread(s): {self.tokens_per_s:,.0f} tokens/s"


def options(rates: Rates, step: Step, *, units: int | None = None) -> list[Option]:
    """All ways to share the cores, fewest threads first; `units` where their number is fixed.

    All units read through one memory, weights and keys and values at the rate of a copy; each has as many rows in a
    step, so that reading alone makes no option better. Products run on each unit's own threads.
    """
    found: list[Option] = []
    for threads in range(1, rates.cores + 1):
        count = rates.cores // threads if units is None else units
        if count * threads > rates.cores and threads > 1:
            break
        reading_s = count * (step.weights_bytes + step.own_bytes) / rates.copy_bytes_per_s
        computing_s = step.rows * step.flops_per_row / rates.gemm_flop_per_s(threads)
        rate = count * step.rows / (reading_s + computing_s) if reading_s + computing_s > 0 else 0.0
        if not found or found[-1].units != count or units is not None:
            found.append(Option(units=count, threads=threads, tokens_per_s=rate))
        else:
            found[-1] = Option(units=count, threads=threads, tokens_per_s=rate)
    return found


def recommend(rates: Rates, step: Step, *, units: int | None = None) -> tuple[Option, list[str]]:
    """The best option, the first of those that are about the same, and why."""
    every = options(rates, step, units=units)
    best = max(option.tokens_per_s for option in every)
    chosen = next(option for option in every if option.tokens_per_s >= (1 - SAME) * best)
    gemm = f"{rates.gemm_one_flop_per_s / 1e9:.0f} GFLOP/s on one thread"
    if rates.cores > 1:
        gemm += f", {rates.gemm_all_flop_per_s / 1e9:.0f} on {rates.cores}"
    others = [str(option) for option in every if option is not chosen]
    reasons = [
        f"recommended: {chosen}" + (f" (others: {'; '.join(others)})" if others else ""),
        f"a step of a unit reads {format_bytes(step.weights_bytes + step.own_bytes)} and computes {step.rows} tokens "
        f"of {step.flops_per_row / 1e9:.2g} GFLOP; measured {gemm}, copies {rates.copy_bytes_per_s / 1e9:.1f} GB/s",
    ]
    return chosen, reasons
