"""Accelerators, links and models as tables: every number with its unit, source and date."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any


@cache
def table(name: str) -> dict[str, dict[str, Any]]:
    """The entries of `name`.toml: accelerators, links or models."""
    text = resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
