"""Devices and what joins them: from `1024xA100-80GB-SXM`, a TOML file's keys, or the words of a published table."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

from fanfold.errors import PlanError
from fanfold.machine.catalogue import table
from fanfold.planner.constants import LINK_EFFICIENCY, NETWORK_EFFICIENCY, POWER_REFERENCE, USABLE_MEMORY


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One device, from the catalogue. Rates are per second, dense, one way."""

    name: str
    architecture: str
    units: int
    memory_bytes: float
    memory_bytes_per_s: float
    peaks: tuple[tuple[str, float], ...]  # precision -> FLOP/s
    devices_per_node: int
    link_bytes_per_s: float  # one device to its node
    allreduce_bytes_per_s: float  # bus bandwidth as nccl-tests counts it
    network_bytes_per_s: float  # a device's share of its node's cards
    clock_share: float = 1.0  # of the clock that its power lets it hold, against the architecture's SXM device
    mesh: bool = False  # a pair sees only its own link

    def peak(self, precision: str) -> float:
        """FLOP/s of a precision, or of the widest one the device has instead."""
        peaks = dict(self.peaks)
        for name in (precision, *_FALLBACK.get(precision, ())):
            if name in peaks:
                return peaks[name]
        return max(peaks.values())

    def has(self, precision: str) -> bool:
        return precision in dict(self.peaks)


_FALLBACK = {
    "fp8": ("bf16", "fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "tf32": ("fp32",),
    "int8": ("bf16", "fp16"),
    "fp4": ("fp8", "bf16"),
    "fp32": ("bf16",),
    "int4": ("bf16", "fp16", "fp32"),
    "q4": ("fp16", "bf16", "fp32"),
    "q8": ("fp16", "bf16", "fp32"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`devices` equal accelerators in nodes of `devices_per_node`."""

    accelerator: Accelerator
    devices: int
    devices_per_node: int
    network_bytes_per_s: float  # a device's share of its node's cards, as sold
    link_allreduce_bytes_per_s: float

    @property
    def network_rate(self) -> float:
        """What a device's share of the cards carries."""
        return self.network_bytes_per_s * NETWORK_EFFICIENCY

    @property
    def memory_bytes(self) -> float:
        return self.accelerator.memory_bytes


def accelerator(name: str) -> Accelerator:
    """The catalogue's entry of that name or alias; PlanError with the closest names."""
    found = _longest_prefix(name)
    if found is None:
        names = sorted(table("accelerators"))
        close = difflib.get_close_matches(name, [*names, *_aliases()], n=3, cutoff=0.3)
        raise PlanError(
            f"accelerator {name[:80]!r}",
            found="none of that name in the catalogue",
            allowed="closest: " + ", ".join(close) if close else ", ".join(names[:8]) + ", ...",
            do="use a name of the catalogue, or describe the device with --cluster FILE.toml",
        )
    return _entry(found)


def _aliases() -> dict[str, str]:
    return {alias: name for name, entry in table("accelerators").items() for alias in entry["aliases"]}


def _longest_prefix(text: str) -> str | None:
    """The entry whose name or alias the text starts with, up to the end of a word; the longest one."""
    names = {**{name: name for name in table("accelerators")}, **_aliases()}
    best = max((name for name in names if _starts(text, name)), key=len, default=None)
    return names[best] if best else None


def _starts(text: str, name: str) -> bool:
    words = r"[\s_-]*".join(re.escape(word) for word in re.split(r"[\s_-]+", name))
    return re.match(rf"\s*(?:nvidia\s+|amd\s+|google\s+)?{words}(?![a-z0-9])", text, re.IGNORECASE) is not None


def _entry(name: str) -> Accelerator:
    entry = table("accelerators")[name]
    kinds = ("fp32", "tf32", "fp16", "bf16", "fp8", "fp4")
    peaks = {kind: entry[f"{kind}_tflop_per_s"] * 1e12 for kind in kinds if f"{kind}_tflop_per_s" in entry}
    if "int8_top_per_s" in entry:
        peaks["int8"] = entry["int8_top_per_s"] * 1e12
    link = entry.get("link_gb_per_s", entry.get("host_gb_per_s", 10)) * 1e9
    reached = entry.get("link_allreduce_gb_per_s")
    return Accelerator(
        name=name,
        architecture="TPU" if entry["architecture"].startswith("TPU") else entry["architecture"],
        units=entry["units"],
        memory_bytes=entry["memory_gb"] * 2**30 * USABLE_MEMORY,
        memory_bytes_per_s=entry["memory_gb_per_s"] * 1e9,
        peaks=tuple(peaks.items()),
        devices_per_node=_node_size(entry),
        link_bytes_per_s=link,
        allreduce_bytes_per_s=reached * 1e9 if reached else LINK_EFFICIENCY * link,
        network_bytes_per_s=entry.get("network_gb_per_s_per_device", 3.1) * 1e9,
        clock_share=_clock_share(entry),
        mesh="mesh" in entry["link"],
    )


def _clock_share(entry: dict[str, Any]) -> float:
    """Power goes with about the square of the clock under load: watts per peak FLOP against the full-power device's."""
    reference = POWER_REFERENCE.get(entry["architecture"])
    if reference is None or "power_w" not in entry or "fp16_tflop_per_s" not in entry:
        return 1.0
    full = table("accelerators")[reference]
    share = (entry["power_w"] / entry["fp16_tflop_per_s"]) / (full["power_w"] / full["fp16_tflop_per_s"])
    return float(min(1.0, share**0.5))


def _node_size(entry: dict[str, Any]) -> int:
    """Devices that the fast link joins; cards without one share a host of eight."""
    joined = int(entry["devices_per_node"])
    return joined if joined > 2 else 8


def cluster(text: str, *, devices_per_node: int | None = None) -> Cluster:
    """The cluster that `8xH100-80GB-SXM` names."""
    found = re.fullmatch(r"\s*([0-9]{1,7})\s*[x*]\s*(\S.*?)\s*", text)
    if not found or int(found[1]) < 1:
        raise PlanError(
            f"--on {text[:80]}",
            found="not a number of accelerators",
            allowed="NxNAME, for example 1024xA100-80GB-SXM",
            do="write how many devices, an x, and their name",
        )
    return of(accelerator(found[2]), int(found[1]), devices_per_node=devices_per_node)


def of(device: Accelerator, devices: int, *, devices_per_node: int | None = None) -> Cluster:
    return Cluster(
        accelerator=device,
        devices=devices,
        devices_per_node=min(devices_per_node or device.devices_per_node, devices),
        network_bytes_per_s=device.network_bytes_per_s,
        link_allreduce_bytes_per_s=device.allreduce_bytes_per_s,
    )


_FILE_KEYS = {
    "devices_per_node": "devices in one node",
    "network_cards_per_node": "cards in one node",
    "network_card_gbit_per_s": "rate of one card, one way",
    "link_gb_per_s": "one device to its node, one way",
    "link_allreduce_gb_per_s": "bus bandwidth of an all-reduce in a node",
    "memory_gb": "memory of a device",
}


def with_file(base: Cluster, values: dict[str, Any], *, path: str) -> Cluster:
    """The cluster with what a --cluster file says in place of the catalogue's numbers."""
    for key, value in values.items():
        good = key in _FILE_KEYS and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if not good:
            raise PlanError(
                f"--cluster {path}",
                found=f"{key} = {value!r}",
                allowed="positive numbers: " + ", ".join(f"{name} ({what})" for name, what in _FILE_KEYS.items()),
                do="correct the file",
            )
    node = int(values.get("devices_per_node", base.devices_per_node))
    changed = replace(base, devices_per_node=min(node, base.devices))
    if "network_card_gbit_per_s" in values:
        cards = values.get("network_cards_per_node", node)
        changed = replace(changed, network_bytes_per_s=cards * values["network_card_gbit_per_s"] / 8 * 1e9 / node)
    elif "network_cards_per_node" in values:
        share = base.network_bytes_per_s * values["network_cards_per_node"] / node
        changed = replace(changed, network_bytes_per_s=share)
    if "link_gb_per_s" in values:
        rate = values["link_gb_per_s"] * 1e9
        changed = replace(changed, link_allreduce_bytes_per_s=LINK_EFFICIENCY * rate)
    if "link_allreduce_gb_per_s" in values:
        changed = replace(changed, link_allreduce_bytes_per_s=values["link_allreduce_gb_per_s"] * 1e9)
    if "memory_gb" in values:
        device = replace(base.accelerator, memory_bytes=values["memory_gb"] * 1e9)
        changed = replace(changed, accelerator=device)
    return changed


def from_words(text: str, devices: int) -> Cluster | None:
    """The cluster that a published table describes in words; None where the accelerator is not in the catalogue.

    The longest catalogue name that the text starts with; what it says of cards and links goes before the catalogue.
    """
    name = _longest_prefix(text)
    if name is None:
        return None
    base = of(_entry(name), devices)
    words = text.lower()
    node = base.accelerator.devices_per_node
    if found := re.search(r"(?<![\w.])([1-9]\d{0,2})\s*(?:gpus?\s+)?per node", words):
        node = int(found[1])
        base = replace(base, devices_per_node=min(node, max(devices, 1)))
    number = r"(\d+(?:\.\d+)?)"
    gbit = r"\s*G(?:bit|bps|b)(?:/s)?"  # GB/s is another thing
    if found := re.search(rf"(\d+)\s*x\s*{number}{gbit}", text):
        rate = int(found[1]) * float(found[2]) / 8 * 1e9 / node
        return replace(base, network_bytes_per_s=rate)
    if found := re.search(rf"{number}{gbit}[^,;)]*per (GPU|gpu|device|accelerator)", text):
        return replace(base, network_bytes_per_s=float(found[1]) / 8 * 1e9)
    if found := re.search(rf"{number}{gbit}[^,;)]*per node", text):
        return replace(base, network_bytes_per_s=float(found[1]) / 8 * 1e9 / node)
    return base
