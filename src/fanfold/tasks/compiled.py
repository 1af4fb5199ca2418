"""A model compiled ahead of time, once for batches of every shape; all units load the same machine code.

torch.export traces the model with symbolic rows and length; AOTInductor makes one shared library of it, weights
included, that every unit loads. So no unit compiles, and what a unit computes does not depend on the shapes that
it saw before. The price: every process holds a copy of the weights of its own, laid out for oneDNN's kernels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError, cause_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VERSION = 3  # raised whenever a release compiles differently
LEAST = 2  # rows and length: 0 and 1 are traced as constants, so smaller batches are filled up


def check_compiler() -> None:
    """PlanError where no C++ compiler is at hand."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not any(shutil.which(name) for name in names):
        raise PlanError(
            "--compile on",
            found=f"no C++ compiler ({', '.join(names)})",
            allowed="machines with a C++ compiler",
            do="install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), or leave --compile away",
        )


def library_path(settings: dict[str, Any]) -> Path:
    """Where the library for these settings lies, in the user's own cache."""
    key = json.dumps({**settings, "torch": version("torch"), "transformers": version("transformers"), "v": VERSION})
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "fanfold" / "compiled" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"


def build(model: Any, path: Path, *, max_rows: int, max_length: int) -> None:
    """The library of `model(ids [B, L], mask [B, L]) -> [B, L, H]` stands under the path; PlanError with the cause."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    rows = torch.export.Dim("rows", min=LEAST, max=max(max_rows, LEAST + 1))
    length = torch.export.Dim("length", min=LEAST, max=max(max_length, LEAST + 1))
    shape = {0: rows, 1: length}
    example = (torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 5, dtype=torch.int64))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder, _quiet(folder):
        try:
            with torch.no_grad():  # freezing is only done without gradients
                exported = torch.export.export(model, example, dynamic_shapes=(shape, shape), strict=False)
                made = torch._inductor.aot_compile(
                    exported.module(),
                    example,
                    # freezing: weights become constants, laid out for oneDNN's kernels
                    options={"aot_inductor.output_path": f"{folder}/model.so", "freezing": True},
                )
        except Exception as error:  # torch raises many kinds, its own and the compiler's
            raise PlanError(
                "--compile on",
                found=f"torch cannot compile this model: {cause_line(error)}",
                allowed="models that torch.export can trace with any number of rows and any length",
                do="leave --compile away; run with --verbose to see where it failed",
            ) from error
        os.replace(made, path)


def load(path: Path) -> Callable[[Any, Any], Any]:
    """(ids [B, L], mask [B, L]) -> hidden states [B, L, H]. B and L at least 2."""
    import torch

    with _quiet():
        run = torch._export.aot_load(str(path), "cpu")  # maps the library; a package would be unpacked by every unit

    def forward(ids_BL: Any, mask_BL: Any) -> Any:
        hidden = run(ids_BL, mask_BL)
        return hidden[0] if isinstance(hidden, list | tuple) else hidden

    return forward


@contextmanager
def _quiet(cache: str | None = None) -> Iterator[None]:
    """Without torch's notes on its own plans; what it writes while it compiles goes to the folder `cache`."""
    set_for = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})}
    before = {name: os.environ.get(name) for name in set_for}
    os.environ.update(set_for)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
