"""Parts as bytes and back, without pickle: nothing that the bytes say is ever executed.

The bytes are a NumPy .npz file, not compressed: the arrays `a0.npy`, `a1.npy`, ... and `part.json`, the tree of values
that names them. Its comment holds the format's version and the SHA-256 of all bytes before it. Arrow data stands in
the arrays as an IPC stream. Dtype, shape, Fortran order and the bits of NaN and of -0.0 are kept; views, memory maps
and equal references come back as arrays of their own.

Loading arrays allocates no more than a few times the bytes given: their sizes are checked against them before use.
Not so for Arrow data, whose streams may be compressed by who wrote them, or for frames made of it.

Merges import neither Arrow nor torch: who loads a part that holds their data has imported them, or gets a DataError.
"""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import zipfile
from dataclasses import fields
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fanfold.errors import DataError
from fanfold.merge.distinct import DistinctPart
from fanfold.merge.extremes import ExtremePart, RangePart
from fanfold.merge.gather import Blocks
from fanfold.merge.histogram import HistogramPart
from fanfold.merge.moments import MomentsPart
from fanfold.merge.quantiles import SketchPart
from fanfold.merge.record import RecordPart
from fanfold.merge.softmax import SoftmaxPart
from fanfold.merge.sums import MeanPart, SumPart
from fanfold.merge.top import TopPart
from fanfold.merge.vote import VotePart

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS = {
    kind.__name__: kind
    for kind in (
        Blocks,
        DistinctPart,
        ExtremePart,
        HistogramPart,
        MeanPart,
        MomentsPart,
        RangePart,
        RecordPart,
        SketchPart,
        SoftmaxPart,
        SumPart,
        TopPart,
        VotePart,
    )
}

VERSION = 1
_MARK = b"fanfold part "
_COMMENT_BYTES = len(_MARK) + 3 + 1 + 64  # mark, version in three digits, blank, SHA-256 in hex
_JSON_INT = 2**53  # larger ints are written in hex: JSON readers differ, and Python limits decimal digits

_ARRAY_KINDS = "biufcSUMmV"


def save(part: Any) -> bytes:
    """The part as bytes; the same part gives the same bytes. DataError for values of a kind that cannot be saved."""
    writer = _Writer()
    try:
        tree = writer.node(part)
    except RecursionError:
        raise _cannot_save("values nested too deeply, or in themselves") from None
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for number, array in enumerate(writer.arrays):
            file.writestr(zipfile.ZipInfo(f"a{number}.npy"), _npy(array))
        file.writestr(zipfile.ZipInfo("part.json"), json.dumps(tree, separators=(",", ":"), allow_nan=False))
        file.comment = bytes(_COMMENT_BYTES)
    body = out.getvalue()[:-_COMMENT_BYTES]
    return body + _comment(body)


def load(data: bytes) -> Any:
    """The part that was saved. Raises DataError for damaged, truncated or foreign bytes, and another version's."""
    data = bytes(data)
    body, comment = data[:-_COMMENT_BYTES], data[-_COMMENT_BYTES:]
    if not data.startswith(b"PK") or not comment.startswith(_MARK):
        raise _cannot_load("bytes that are no saved part, or the end is missing")
    if comment != _comment(body):
        version = comment[len(_MARK) :].split(b" ")[0]
        if version.isdigit() and int(version) != VERSION:
            raise _cannot_load(f"format version {int(version)}", allowed=f"format version {VERSION}")
        raise _cannot_load("bytes that do not match their checksum: damaged")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = file.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > len(data):
                raise _cannot_load("compressed or overlapping entries")
            return _Reader(file).node(json.loads(file.read("part.json")))
    except DataError:
        raise
    except RecursionError:
        raise _cannot_load("values nested too deeply") from None
    except Exception as error:  # what a wrong tree, header or stream leads to: each library has its own
        raise _cannot_load(f"no part inside ({type(error).__name__}: {str(error).strip()[:80]})") from error


class _Writer:
    """Turns values into JSON; arrays are kept aside under their number."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []

    def node(self, value: Any) -> Any:
        cls = type(value)
        if value is None or cls in (bool, str):
            return value
        if cls is int:
            return value if abs(value) < _JSON_INT else ["int", hex(value)]
        if cls is float:
            return ["float", _float_text(value)]
        if cls is complex:
            return ["complex", _float_text(value.real), _float_text(value.imag)]
        if cls in (list, tuple):
            return [cls.__name__, *map(self.node, value)]
        if cls is dict:
            return ["dict", *([self.node(key), self.node(item)] for key, item in value.items())]
        if cls is bytes:
            return ["bytes", self.raw(value)]
        if PARTS.get(cls.__name__) is cls:
            own = [[name, self.node(getattr(value, name))] for name in _fields(cls)]
            return ["part", cls.__name__, *own]
        package = cls.__module__.partition(".")[0]
        if package == "numpy" and hasattr(value, "dtype") and hasattr(value, "shape"):
            return self.numpy(value)
        if package == "torch" and cls.__name__ == "Tensor":
            return self.tensor(value)
        if package in ("pyarrow", "pandas", "polars"):
            return self.table(package, value)
        raise _cannot_save(f"a {cls.__module__}.{cls.__qualname__}".replace("builtins.", ""))

    def array(self, array: Any) -> int:
        self.arrays.append(array)
        return len(self.arrays) - 1

    def raw(self, data: Any) -> int:
        import numpy as np

        return self.array(np.frombuffer(data, np.uint8))

    def numpy(self, value: Any) -> Any:
        import numpy as np

        scalar = isinstance(value, np.generic)
        if value.dtype.hasobject or value.dtype.kind not in _ARRAY_KINDS:
            raise _cannot_save(f"an array of {value.dtype}")
        if not scalar and type(value) not in (np.ndarray, np.memmap):
            raise _cannot_save(f"a numpy.{type(value).__name__}")
        return ["scalar" if scalar else "array", self.array(np.asarray(value))]

    def tensor(self, value: Any) -> Any:
        if value.device.type != "cpu" or value.layout != sys.modules["torch"].strided or value.is_quantized:
            raise _cannot_save(f"a {value.layout} tensor on {value.device}".replace("torch.", ""))
        value = value.detach().resolve_conj().resolve_neg().contiguous()
        dtype = str(value.dtype).rpartition(".")[2]
        raw = value.reshape(-1).view(sys.modules["torch"].uint8).numpy() if value.numel() else b""
        return ["tensor", dtype, list(value.shape), self.raw(raw)]

    def table(self, package: str, value: Any) -> Any:
        kind, pa = type(value).__name__, _package("pyarrow", "save Arrow data or a frame")
        try:
            table = _as_table(pa, package, kind, value)
        except (pa.ArrowException, AttributeError, TypeError) as error:
            raise _cannot_save(f"a {package} {kind} that Arrow cannot hold: {str(error)[:120]}") from error
        with io.BytesIO() as out:
            with pa.ipc.new_stream(out, table.schema) as stream:
                stream.write_table(table)
            return [package, kind, self.raw(out.getvalue())]


class _Reader:
    """Turns JSON into values again. Whatever is wrong raises some error, which `load` turns into a DataError."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self._used = 0

    def node(self, tree: Any) -> Any:
        if tree is None or isinstance(tree, (bool, str, int)):
            return tree
        name, *rest = tree
        if name == "int":
            return int(rest[0], 16)
        if name == "float":
            return _float(rest[0])
        if name == "complex":
            return complex(_float(rest[0]), _float(rest[1]))
        if name in ("list", "tuple"):
            values = [self.node(item) for item in rest]
            return values if name == "list" else tuple(values)
        if name == "dict":
            return {self.node(key): self.node(item) for key, item in rest}
        if name == "bytes":
            return self.array(rest[0]).tobytes()
        if name == "part":
            kind, own = PARTS[rest[0]], {key: self.node(item) for key, item in rest[1:]}
            if own.keys() != set(_fields(kind)):
                raise _cannot_load(f"a {rest[0]} with the fields {', '.join(map(str, own))}"[:120])
            return kind(**own)
        if name in ("array", "scalar"):
            array = self.array(rest[0])
            return array if name == "array" else array[()]
        if name == "tensor":
            return self.tensor(*rest)
        if name in ("pyarrow", "pandas", "polars"):
            return self.table(name, rest[0], self.array(rest[1]))
        raise _cannot_load(f"a value of the kind {name!r}"[:80])

    def array(self, number: int) -> Any:
        """The array of that number; arrays are numbered in the order of the tree, so each is read once."""
        if number != self._used:
            raise _cannot_load("an array used twice or out of order")
        self._used += 1
        return _from_npy(self._file.read(f"a{number:d}.npy"))

    def tensor(self, dtype: str, shape: list[int], number: int) -> Any:
        torch = _package("torch", "load a tensor")
        kind = getattr(torch, dtype)
        if not isinstance(kind, torch.dtype):
            raise _cannot_load("a tensor of no dtype")
        raw = self.array(number)
        flat = torch.from_numpy(raw).view(kind) if raw.size else torch.empty(0, dtype=kind)
        return flat.reshape(shape)

    def table(self, package: str, kind: str, raw: Any) -> Any:
        pa = _package("pyarrow", "load Arrow data or a frame")
        library = _package(package, "load a frame of its kind")
        with pa.ipc.open_stream(pa.py_buffer(raw)) as stream:
            table = stream.read_all()
        table.validate(full=True)
        if package == "pandas":
            frame = table.to_pandas()
            return frame if kind == "DataFrame" else _renamed(frame.iloc[:, 0], table)
        if package == "polars":
            frame = library.from_arrow(table)
            return frame if kind == "DataFrame" else frame.to_series(0)
        if kind == "Table":
            return table
        if kind == "RecordBatch":
            batches = table.combine_chunks().to_batches()
            return batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)
        column = table.column(0)
        return column if kind == "ChunkedArray" else column.combine_chunks()


def _fields(kind: Any) -> Sequence[str]:
    """Of a dataclass or a named tuple."""
    return kind._fields if issubclass(kind, tuple) else [field.name for field in fields(kind)]


def _as_table(pa: Any, package: str, kind: str, value: Any) -> Any:
    if package == "pandas":
        if kind not in ("DataFrame", "Series"):
            raise TypeError("neither frame nor Series")
        if kind == "DataFrame":
            return pa.Table.from_pandas(value)
        named = isinstance(value.name, str)
        table = pa.Table.from_pandas(value.to_frame(value.name if named else "values"))
        return table.replace_schema_metadata({**(table.schema.metadata or {}), b"named": b"1" if named else b"0"})
    if package == "polars":
        return value.to_arrow() if kind == "DataFrame" else value.to_frame().to_arrow()
    if kind == "Table":
        return value
    if kind == "RecordBatch":
        return pa.Table.from_batches([value])
    chunked = value if kind == "ChunkedArray" else pa.chunked_array([value])
    return pa.table({"values": chunked})


def _renamed(series: Any, table: Any) -> Any:
    return series if table.schema.metadata[b"named"] == b"1" else series.rename(None)


def _npy(array: Any) -> bytes:
    import numpy as np

    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=False)
    return out.getvalue()


def _from_npy(data: bytes) -> Any:
    """The array in an .npy file. Its header's shape is believed only if it fits the bytes."""
    import numpy as np

    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject or dtype.kind not in _ARRAY_KINDS:
        raise _cannot_load(f"an array of {dtype}")
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes != len(data) - file.tell() or any(length < 0 for length in shape):
        raise _cannot_load("an array whose shape does not fit its bytes")
    array = np.empty(shape, dtype, order="F" if fortran else "C")
    if num_bytes:
        array.reshape(-1, order="A")[:] = np.frombuffer(data, dtype, offset=file.tell())
    return array


def _comment(body: bytes) -> bytes:
    return b"%s%03d %s" % (_MARK, VERSION, sha256(body).hexdigest().encode())


def _float_text(value: float) -> str:
    return value.hex() if math.isfinite(value) else struct.pack(">d", value).hex()


def _float(text: str) -> float:
    return float.fromhex(text) if "x" in text else float(struct.unpack(">d", bytes.fromhex(text))[0])


def _package(name: str, purpose: str) -> Any:
    """The package, which the program has imported: merges import neither Arrow nor torch nor frames."""
    if name not in sys.modules:
        raise DataError(
            purpose,
            found=f"{name} is not imported",
            allowed=f"a program that has imported {name}",
            do=f"write `import {name}` before",
        )
    return sys.modules[name]


def _cannot_save(found: str) -> DataError:
    return DataError(
        "save a part of a merge",
        found=found,
        allowed="None, bool, int, float, complex, str, bytes; tuples, lists and dicts of these; NumPy arrays and "
        "scalars, not of objects; torch tensors on the CPU; Arrow data, pandas and Polars frames; the parts of "
        "Fanfold's own merges",
        do="let the merge's parts be made of these, or pickle them",
    )


def _cannot_load(found: str, allowed: str = "bytes that fanfold.merge.codec.save gave, unchanged") -> DataError:
    return DataError(
        "load a part of a merge", found=found, allowed=allowed, do="save the part again, or fetch its bytes again"
    )
