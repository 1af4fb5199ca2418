"""Weights by slice: a rank reads of the safetensors files only what it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from fanfold.errors import InputError
from fanfold.parallel.pieces import add_piece

if TYPE_CHECKING:
    from pathlib import Path

    from fanfold.parallel.pieces import Pieces
    from fanfold.parallel.split import Share

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Cut:
    """Of which dimension of the whole tensor a rank holds which indices; `then`, of another dimension of those."""

    dim: int
    index: list[int]
    then: Cut | None = None

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        found = whole.index_select(self.dim, torch.tensor(self.index, device=whole.device))
        return found if self.then is None else self.then.of(found)


@dataclass(slots=True)
class Files:
    """The tensors of a checkpoint: name -> file."""

    folder: Path
    where: dict[str, Path] = field(default_factory=dict)
    pieces: dict[str, Pieces] = field(default_factory=dict)  # what stands in several tensors
    read_bytes: int = 0
    _open: dict[Path, Any] = field(default_factory=dict)

    def read(self, name: str, cut: Cut | None) -> torch.Tensor:
        """The tensor or its share, each run of neighbours with one read."""
        if name in self.pieces:
            return self.pieces[name].read(self, cut, Cut)
        file = self._file_of(name)
        found = file.get_tensor(name) if cut is None else _slices(file.get_slice(name), cut)
        self.read_bytes += found.numel() * found.element_size()
        tensor: torch.Tensor = found
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.pieces:
            return self.pieces[name].shape(self)
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def _file_of(self, name: str) -> Any:
        """Open once: tensors keep their mapping, and each mapping counts in full where memory is limited."""
        from safetensors import safe_open

        path = self.where[name]
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
        return self._open[path]


def _slices(whole: Any, cut: Cut, before: tuple[tuple[int, slice], ...] = ()) -> torch.Tensor:
    parts = []
    for run in runs(cut.index):
        at = (*before, (cut.dim, run))
        if cut.then is not None:
            parts.append(_slices(whole, cut.then, at))
        else:
            dims = dict(at)
            parts.append(whole[tuple(dims.get(dim, slice(None)) for dim in range(max(dims) + 1))])
    return torch.cat(parts, dim=cut.dim) if len(parts) > 1 else parts[0]


def runs(index: list[int]) -> list[slice]:
    """Consecutive numbers as slices, in their order."""
    borders = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(index)) if b != a + 1), len(index)]
    return [slice(index[start], index[stop - 1] + 1) for start, stop in pairwise(borders) if stop > start]


def open_files(folder: Path, shown: str) -> Files:
    """Raises InputError where an index names what is not there."""
    from safetensors import safe_open

    files = Files(folder)
    index = folder / INDEX
    if index.exists():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise _unusable(shown, f"{INDEX} cannot be read: {error}") from None
        for name, file in listed.items():
            files.where[name] = folder / file
        gone = sorted({path.name for path in files.where.values() if not path.exists()})
        if gone:
            raise _unusable(shown, f"{INDEX} names {', '.join(gone)}, which is not there")
        for path in set(files.where.values()):
            with safe_open(str(path), framework="pt") as file:
                there = set(file.keys())
            missing = sorted(name for name, at in files.where.items() if at == path and name not in there)
            if missing:
                raise _unusable(shown, f"{path.name} lacks {', '.join(missing[:3])}, which {INDEX} says it holds")
        return files
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            files.where.update(dict.fromkeys(file.keys(), path))
    if not files.where:
        raise _unusable(shown, "no *.safetensors file")
    return files


def fill(share: Share, files: Files, dtype: Any, shown: str) -> None:
    """Every parameter (on the meta device before) and persistent buffer gets its values; tied ones once.

    Raises: InputError names tensors that are missing or of another shape.
    """
    model, prefix = share.model, share.model.base_model_prefix
    names = _names_now(model, files, shown)
    missing: list[str] = []
    filled: dict[int, torch.nn.Parameter] = {}
    persistent = set(model.state_dict().keys())
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if id(old) not in filled:
            source = next((n for n in share.same[name] if _key(n, names, prefix) is not None), None)
            if source is None and name.startswith("pooler."):  # many have none, and nobody uses it
                filled[id(old)] = torch.nn.Parameter(torch.zeros(old.shape, dtype=dtype), requires_grad=False)
            elif source is None:
                missing.append(name)
                continue
        if id(old) not in filled:
            assert source is not None
            found = _key(source, names, prefix)
            assert found is not None
            shape = files.shape(found)
            if shape != share.shapes[source]:
                raise _unusable(shown, f"{found} has the shape {shape}, the config asks for {share.shapes[source]}")
            value = files.read(found, share.cuts.get(name)).to(dtype)
            filled[id(old)] = torch.nn.Parameter(value, requires_grad=value.is_floating_point())  # as from_pretrained
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._parameters[leaf] = filled[id(old)]
    for name, buffer in model.named_buffers():
        key = _key(name, names, prefix)
        if name in persistent and key is not None and files.shape(key) == tuple(buffer.shape):
            buffer.copy_(files.read(key, None).to(buffer.dtype))
    if missing:
        raise _unusable(shown, f"weights are missing: {', '.join(missing[:3])}" + (" ..." if missing[3:] else ""))


def _key(name: str, names: dict[str, str], prefix: str) -> str | None:
    """The checkpoint's name of a parameter: with or without the base model's prefix."""
    for tried in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if tried in names:
            return names[tried]
    return None


def _names_now(model: Any, files: Files, shown: str) -> dict[str, str]:
    """The model's names for the checkpoint's tensors -> the checkpoint's: old checkpoints have others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    names = {}
    for name in files.where:
        renamed, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None:
            converter = next(entry for entry in converters if pattern in entry.source_patterns)
            add_piece(files.pieces, renamed, name, pattern, converter, shown)
            names[renamed] = renamed
            continue
        names[renamed] = name
    return names


def _unusable(shown: str, found: str) -> InputError:
    return InputError(
        f"loading {shown}",
        found=found,
        allowed="a model folder with all weights of its config in safetensors files",
        do="save or download the model again",
    )
