"""The one door for optional packages."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from fanfold.errors import MissingExtra


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


class Room(ModuleType):
    """A module that has the name of a public function: `fanfold.plan`, once imported, is the room and can be called."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return sys.modules["fanfold"].__getattr__(self.__name__.rpartition(".")[2])(*args, **options)


def make_callable(module: str) -> None:
    """From now on a call of the module is a call of the public function of its name."""
    sys.modules[module].__class__ = Room
