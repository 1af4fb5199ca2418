"""One model over several units: weights and work are split, the result is that of the whole model.

The room has the name of a function, `ff.parallel`; once the room is imported, `fanfold.parallel` is this module, so it
can be called, too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return sys.modules["fanfold"].__getattr__("parallel")(*args, **options)


sys.modules[__name__].__class__ = _Room
