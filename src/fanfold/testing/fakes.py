"""Fakes that behave like the real thing and need no extras."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fanfold.tasks.chunking import Chunking, mean_of_parts, prepared_parts
from fanfold.tasks.task import Column, ModelBatch, Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fanfold.data.reading import Reading
    from fanfold.plan.numerics import Dtype, Numerics
    from fanfold.plan.plan import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeTask:
    """A cheap deterministic "embedding" of a text: its tokens are its bytes, its vector depends on them
    and, as a real model's does in the last bits, on the shape of the batch it is computed in.

    `faults` maps a text to what happens when it is computed: raise, exit, segfault, hang, spin, memory, once:NAME
    (the fault NAME, but only while the file `once_path` does not exist, which it then makes).
    """

    width: int = 8
    token_s: float = 0.0  # seconds a padded token takes
    max_length: int = 64
    faults: dict[str, str] = field(default_factory=dict)
    once_path: str = ""
    load_fault: str = ""
    calls_path: str = ""  # a file that grows by one byte with every call of the model
    name: str = "fake"
    reference: str = "fake"
    weights_bytes: int = 0
    unit_bytes: int = 0
    counted: tuple[str, ...] = ()
    flops_per_token: float = 0.0
    dtype: Dtype = "float32"
    version: int = 1
    chunking: Chunking | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="embedding", kind="vector", width=self.width),)

    @property
    def imports(self) -> tuple[str, ...]:
        return ("numpy", "fanfold.testing.fakes")

    @property
    def key(self) -> str:
        return repr(self)

    @property
    def record(self) -> dict[str, Any]:
        settings = {"task": self.name, "width": self.width, "max_length": self.max_length, "version": self.version}
        return {**settings, **({"chunk": self.chunking.record} if self.chunking else {})}

    def reading(self, column: str) -> Reading:
        return column

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def numerics(self) -> dict[str, Any]:
        return {}

    @property
    def shown(self) -> dict[str, str]:
        return {"model": f"fake of width {self.width}"}

    def merge_parts(self, values: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        return {"embedding": mean_of_parts(values["embedding"], tokens, normalize=False)}

    def compiled_for(self, numerics: Numerics) -> bool:
        return True

    def compile(self, numerics: Numerics) -> None:
        pass

    def open(self, unit: Unit, numerics: Numerics) -> FakeOnUnit:
        return FakeOnUnit(self)


class FakeOnUnit:
    """FakeTask on one unit."""

    def __init__(self, task: FakeTask) -> None:
        self.task = task
        self._hogs: list[bytearray] = []
        self._faults = {text.encode()[: task.max_length]: fault for text, fault in task.faults.items()}

    def prepare(self, texts: Sequence[str], rows: Sequence[int] = ()) -> Prepared:
        import numpy as np

        limit = self.task.max_length
        data = [text.encode("utf-8") for text in texts]
        if self.task.chunking is not None:
            whole = (np.frombuffer(row or b"\0", dtype=np.uint8).astype(np.int32) for row in data)
            return prepared_parts(whole, self.task.chunking, head=0, tail=0)
        ids = [np.frombuffer(row[:limit] or b"\0", dtype=np.uint8).astype(np.int32) for row in data]
        return Prepared(ids=ids, truncated=[i for i, row in enumerate(data) if len(row) > limit])

    def filler(self) -> np.ndarray:
        import numpy as np

        return np.zeros(1, dtype=np.int32)

    def load(self) -> None:
        if self.task.load_fault:
            self._cause(self.task.load_fault)

    def compute(self, batch: ModelBatch) -> dict[str, Any]:
        import numpy as np

        ids, length = batch.ids, batch.length
        if self.task.calls_path:
            fd = os.open(self.task.calls_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, b".")
            os.close(fd)
        if self.task.token_s:
            time.sleep(self.task.token_s * length * len(ids))
        vectors = np.empty((len(ids), self.task.width), dtype=np.float32)
        for row, tokens in enumerate(ids):
            text = tokens.astype(np.uint8).tobytes()
            if text in self._faults:
                self._cause(self._faults[text])
            digest = hashlib.sha256(text + b"|%d|%d" % (length, len(ids))).digest()
            seed = np.frombuffer((digest * (self.task.width // 8 + 1))[: self.task.width * 4], dtype=np.uint32)
            vectors[row] = seed.astype(np.float64) / 2**32
        return {"embedding": vectors}

    def _cause(self, fault: str) -> None:
        if fault.startswith("once:"):
            try:
                os.close(os.open(self.task.once_path, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            fault = fault.removeprefix("once:")
        match fault:
            case "raise":
                raise ValueError("this row is poison")
            case "exit":
                os._exit(7)
            case "segfault":
                ctypes.string_at(0)
            case "hang":
                time.sleep(3600)
            case "spin":  # in C code that never lets another thread of the interpreter run
                re.match(r"(a|a)*c", "a" * 64)
            case "memory":
                while True:
                    self._hogs.append(bytearray(50_000_000))
            case _:
                raise RuntimeError(f"no such fault: {fault}")
