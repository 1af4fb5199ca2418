"""Amounts as people write them: bytes, shares, durations; read exactly, or refused with how to write them.

GB is decimal (10^9), GiB is binary (2^30), everywhere in Fanfold, in and out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from fanfold.errors import RequestError

_BYTE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15, "eb": 10**18,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50, "eib": 2**60,
}  # fmt: skip
_SECOND_UNITS = {
    "ms": Fraction(1, 1000), "s": Fraction(1), "sec": Fraction(1),
    "m": Fraction(60), "min": Fraction(60), "h": Fraction(3600), "d": Fraction(86400),
}  # fmt: skip
_MOST_BYTES = 2**63 - 1
_LONGEST_DAYS = 36_500
_NUMBER = r"[0-9]{1,24}(?:\.[0-9]{1,24})?"  # bounded: a hostile text of digits costs nothing
_BYTES = re.compile(rf"({_NUMBER})\s*([a-z]*)")
_DURATION_PART = re.compile(rf"\s*({_NUMBER})\s*([a-z]+)\s*")
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How much may fail: a share of the rows seen, or a number of rows; exactly one of the two is set."""

    share: Fraction | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.count is None):
            raise RequestError(
                "a limit is a share or a count",
                found=f"share={self.share}, count={self.count}",
                allowed="exactly one of the two",
                do="write Limit(share=Fraction(5, 100)) or Limit(count=12)",
            )

    def allows(self, failed: int, seen: int) -> bool:
        """Whether `failed` rows out of `seen` stay within the limit; exact, the limit itself is allowed."""
        if self.count is not None:
            return failed <= self.count
        assert self.share is not None  # __post_init__
        return failed <= self.share * seen

    def __str__(self) -> str:
        """The text that `parse_share` reads back as the same limit."""
        if self.share is None:
            return str(self.count)
        percent = self.share * 100
        return f"{percent.numerator}%" if percent.denominator == 1 else f"{float(percent):.12g}%"


def parse_bytes(text: str | int, *, name: str = "bytes") -> int:
    """Whole bytes of '8GB', '1.5GiB', '512 MB', '1024' or 1024; a fraction of a byte is dropped.

    A single letter (8G) is refused: half of the tools mean 10^9 by it, half 2^30.
    `name` is the flag or field that the message names.
    """
    if isinstance(text, int):
        text = str(int(text)) if not isinstance(text, bool) else repr(text)
    found = _BYTES.fullmatch(text.strip().lower())
    number = Fraction(found[1]) * _BYTE_UNITS[found[2]] if found and found[2] in _BYTE_UNITS else None
    if number is None or number > _MOST_BYTES:
        raise _refused(
            name,
            text,
            allowed="a number of bytes up to 2^63-1, with B, kB, MB, GB, TB (decimal) or KiB, MiB, GiB, TiB",
            do=_bytes_advice(found, name),
        )
    return int(number)


def parse_share(text: str | int, *, name: str = "limit") -> Limit:
    """The limit that '5%' (a share of the rows) or '12' (a number of rows) stands for."""
    if isinstance(text, int):
        text = str(int(text)) if not isinstance(text, bool) else repr(text)
    stripped = text.strip()
    if re.fullmatch(r"[0-9]{1,18}", stripped):
        return Limit(count=int(stripped))
    percent = re.fullmatch(rf"({_NUMBER})\s*%", stripped)
    if percent and Fraction(percent[1]) <= 100:
        return Limit(share=Fraction(percent[1]) / 100)
    fraction = re.fullmatch(r"0?\.[0-9]{1,18}", stripped)
    advice = f"{float(stripped) * 100:.12g}%" if fraction else "5%"
    raise _refused(
        name,
        text,
        allowed="a share from 0% to 100%, or a whole number of rows",
        do=f"write {name}={advice} for a share, or for example {name}=12 for a number of rows",
    )


def parse_duration_s(text: str | float, *, name: str = "duration") -> float:
    """Seconds of '90', '90s', '500ms', '1.5h', '1h30m', '2 d' or 90; never negative, at most 100 years."""
    written = str(text).strip().lower()
    seconds: Fraction | None = None
    if isinstance(text, bool):
        pass
    elif isinstance(text, (int, float)):
        seconds = Fraction(text) if math.isfinite(text) and text >= 0 else None
    elif re.fullmatch(_NUMBER, written):
        seconds = Fraction(written)
    elif re.fullmatch(rf"(?:{_DURATION_PART.pattern}){{1,8}}", written):
        parts = _DURATION_PART.findall(written)
        if all(unit in _SECOND_UNITS for _, unit in parts):
            seconds = sum((Fraction(number) * _SECOND_UNITS[unit] for number, unit in parts), Fraction(0))
    if seconds is None or seconds > _LONGEST_DAYS * 86400:
        raise _refused(
            name,
            text,
            allowed="seconds, or numbers with ms, s, min (m), h, d; up to 100 years",
            do=f"write for example {name}=90s, {name}=1.5h or {name}=1h30m",
        )
    return float(seconds)


def format_bytes(num_bytes: float) -> str:
    """Three digits and a decimal unit: '512 B', '1.50 GB'; `parse_bytes` reads it back, rounded.

    >>> format_bytes(1_500_000_000)
    '1.50 GB'
    """
    return _scaled(num_bytes, "B")


def format_duration(seconds: float) -> str:
    """One or two units: '450 ms', '12 s', '3 min 20 s', '2 h 05 min', '1 d 03 h'; 'unknown' if not finite."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_count(count: int) -> str:
    """Digits in threes: 12345 is '12,345'."""
    return f"{count:,}"


def format_rate(per_s: float, unit: str = "rows") -> str:
    """'12,345 rows/s', '3.42 rows/s'; FLOP and B take prefixes: '130 GFLOP/s'; 'unknown' if not finite."""
    if not math.isfinite(per_s):
        return "unknown"
    if unit in ("FLOP", "B"):
        return _scaled(per_s, unit) + "/s"
    return f"{_three_digits(per_s)} {unit}/s"


def _scaled(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "unknown"
    step = 0
    while abs(value) >= 999.5 and step + 1 < len(_PREFIXES):
        value, step = value / 1000, step + 1
    number = f"{value:.0f}" if step == 0 and value == int(value) else _three_digits(value)
    return f"{number} {_PREFIXES[step]}{unit}"


def _three_digits(value: float) -> str:
    """About three digits, never an exponent: 0.0123, 1.23, 12.3, 123, 1,234."""
    if value == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))  # 9.999 has the digits of 10.0
    return f"{value:,.{min(max(decimals, 0), 9)}f}"


def _bytes_advice(found: re.Match[str] | None, name: str) -> str:
    if found and found[2] in _BYTE_UNITS:
        return "write a smaller number"
    if found and found[2] and found[2][0] in "kmgtpe":
        number, letter = found[1], found[2][0].upper()
        decimal = "kB" if letter == "K" else f"{letter}B"
        return f"write {name}={number}{decimal} (powers of 1000) or {name}={number}{letter}iB (powers of 1024)"
    return f"write for example {name}=8GB or {name}=1.5GiB"


def _refused(name: str, text: object, *, allowed: str, do: str) -> RequestError:
    shown = repr(text)
    return RequestError(
        f"{name} cannot be read",
        found=shown if len(shown) <= 80 else shown[:77] + "...",
        allowed=allowed,
        do=do,
    )


def printable(text: str) -> str:
    """Text from outside as one that cannot move a cursor, change colors or the direction of writing."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)
