"""The one door for optional packages."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from fanfold.errors import MissingExtra

if TYPE_CHECKING:
    from types import ModuleType


def need(module: str, *, extra: str, purpose: str) -> ModuleType:
    """The imported module; raises MissingExtra with the pip line where it is not installed."""
    if not has(module):
        raise MissingExtra(
            f"{purpose} needs the package {module}",
            found="it is not installed in this Python",
            allowed=f"any environment with the extra '{extra}'",
            do=f"pip install 'fanfold[{extra}]'",
        )
    return importlib.import_module(module)


def has(module: str) -> bool:
    """Whether the module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
