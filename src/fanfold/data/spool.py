"""Inputs without random access (stdin, .gz, .zst): cut in the parent, a spool file a window for the workers.

A window's spool file holds the decompressed bytes of its records, without BOMs and CSV headers. Spans count
bytes in the spool file, but keep the number of the file and of the line they come from.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import os
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import pyarrow as pa

from fanfold.data.failures import inert
from fanfold.data.lines import BLOCK_BYTES, Cutter, Dealer, blocks
from fanfold.data.listing import STDIN, compression, open_binary
from fanfold.data.records import (
    SpanJoiner,
    check_window_rows,
    chunks_of,
    read_records,
    rows_left,
    total_bytes,
)
from fanfold.errors import InputError, InternalError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fanfold.data.records import Decoder, Record
    from fanfold.data.source import Chunk, InputFile, Window


class Replay:
    """Standard input: `peek` may look into it once, then `start` gives it once from its beginning."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._seen = io.BytesIO()
        self._started = False

    def peek(self) -> BinaryIO:
        return cast("BinaryIO", _Peek(self._stream, self._seen))

    def start(self) -> BinaryIO:
        if self._started:
            raise InputError(
                "standard input is read again",
                found="it was read already, and a stream has no way back",
                allowed="one pass over standard input",
                do="write the input to a file and name that file",
            )
        self._started = True
        self._seen.seek(0)
        return cast("BinaryIO", _Chain(self._seen, self._stream))


class _Peek:
    def __init__(self, stream: BinaryIO, seen: io.BytesIO) -> None:
        self._stream, self._seen = stream, seen

    def read(self, num_bytes: int) -> bytes:
        data = self._stream.read(num_bytes)
        self._seen.write(data)
        return data

    def close(self) -> None:
        pass


class _Chain:
    def __init__(self, first: io.BytesIO, then: BinaryIO) -> None:
        self._first, self._then = first, then

    def read(self, num_bytes: int) -> bytes:
        data = self._first.read(num_bytes)
        if not data and self._first.tell():
            self._first = io.BytesIO()  # its memory is free from here on
        return data or self._then.read(num_bytes)

    def close(self) -> None:
        pass


class _Unpacked:
    """A compressed file's bytes; what is wrong with it is an InputError that names the file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._handle = open_binary(path)
        if compression(path) == ".gz":
            self._stream: Any = gzip.GzipFile(fileobj=self._handle)
        else:
            self._stream = pa.CompressedInputStream(pa.PythonFile(self._handle, "r"), "zstd")

    def read(self, num_bytes: int) -> bytes:
        try:
            return bytes(self._stream.read(num_bytes))
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise InputError(
                f"the input {inert(self._path)}",
                found=f"it cannot be decompressed to its end: {inert(str(error))}",
                allowed="a complete .gz or .zst file",
                do="copy or make the file again; check it with: "
                + ("gzip -t" if compression(self._path) == ".gz" else "zstd -t"),
            ) from error

    def close(self) -> None:
        self._stream.close()
        self._handle.close()


def open_stream(path: str) -> BinaryIO:
    """The file's bytes from its beginning, decompressed."""
    return cast("BinaryIO", _Unpacked(path)) if compression(path) else open_binary(path)


class _SpoolFile:
    """A window's spool file while it is written, under a name of its own until it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._handle = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: memoryview) -> None:
        self._handle.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def publish(self) -> str:
        """Closes the file under its name, leaving an equal one alone; returns the hash."""
        self._handle.close()
        sha256 = self._hash.hexdigest()
        if _is_equal(self._path, self.num_bytes, sha256):
            self._temporary.unlink()
        else:
            self._temporary.replace(self._path)
        return sha256

    def discard(self) -> None:
        self._handle.close()
        self._temporary.unlink(missing_ok=True)


def _is_equal(path: Path, num_bytes: int, sha256: str) -> bool:
    try:
        if path.stat().st_size != num_bytes:
            return False
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


class _Writer:
    """Writes the bytes behind the window before to the spool file of the window under way."""

    def __init__(self, folder: Path, joiner: SpanJoiner) -> None:
        self._folder = folder
        self._joiner = joiner
        self._open: _SpoolFile | None = None
        self.written_to: int | None = None  # position in the current input file; None: its rows are not reached

    def write(self, block: bytes, base: int, stop: int) -> None:
        """Bytes of the block, whose first is at `base`, from where the last write ended up to `stop`."""
        if self.written_to is None or stop <= self.written_to:
            return
        if self._open is None:
            self._open = _SpoolFile(spool_path(self._folder, self._joiner.index))
        self._open.write(memoryview(block)[max(self.written_to - base, 0) : stop - base])
        self.written_to = stop

    def position(self, at: int) -> int:
        """Where a byte of the input file that is written already lies in the spool file."""
        if self._open is None or self.written_to is None:
            raise InternalError("a position in a spool file", found="no file is open", allowed="one", do="report this")
        return at + self._open.num_bytes - self.written_to

    def close(self) -> Window:
        sha256 = self._open.publish() if self._open else None
        self._open = None
        return self._joiner.close(sha256)

    def discard(self) -> None:
        if self._open:
            self._open.discard()


def spool_path(folder: Path, window_index: int) -> Path:
    """Where a window's bytes lie."""
    return folder / f"w-{window_index:09d}"


@dataclass(frozen=True, kw_only=True)
class SpoolSource:
    """Files of a line format of which at least one is a stream or compressed."""

    files: tuple[InputFile, ...]
    decoder: Decoder
    spool: Path | None
    limit: int | None = None
    block_bytes: int = BLOCK_BYTES
    stdin: Replay | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stdin": None}

    @property
    def kept_schema(self) -> pa.Schema:
        return self.decoder.schema

    @property
    def total_bytes(self) -> int | None:
        return total_bytes(self.files)

    def windows(self, window_rows: int, after: Window | None = None) -> Iterator[Window]:
        check_window_rows(window_rows)
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        skip = after.first_row + after.num_rows if after else 0
        dealer = Dealer(window_rows, skip=skip, left=rows_left(self.limit, after))
        joiner = SpanJoiner(after)
        writer = _Writer(folder, joiner)
        try:
            for file in range(len(self.files)):
                if dealer.done:
                    break
                yield from self._windows_of(file, dealer, joiner, writer)
            if joiner.spans:
                yield writer.close()
        finally:
            writer.discard()

    def chunks(self, window: Window) -> Iterator[Chunk]:
        path = spool_path(self._folder(), window.index)
        num_bytes = path.stat().st_size if path.exists() else 0
        if not _is_equal(path, num_bytes, window.sha256 or ""):
            raise InputError(
                f"the spooled input {path}",
                found="the file is gone or not what was written",
                allowed="the spool folder as the running job left it",
                do="run the same command again: it spools the window anew",
            )
        return chunks_of(self._records(path, window), self.decoder, self.files, window)

    def digest(self, window: Window) -> str:
        return window.sha256 or ""

    def release(self, window_index: int) -> None:
        spool_path(self._folder(), window_index).unlink(missing_ok=True)

    def _folder(self) -> Path:
        if self.spool is None:
            raise InternalError(
                "a compressed or streamed input is cut into windows",
                found="open_source was given no spool folder",
                allowed="open_source(..., spool=FOLDER)",
                do="report this",
            )
        return self.spool

    def _open(self, file: int) -> BinaryIO:
        path = self.files[file].path
        if path != STDIN:
            return open_stream(path)
        if self.stdin is None:
            raise InternalError(
                "standard input is cut into windows",
                found="a source without its stream: it was sent to another process",
                allowed="cutting in the process that opened the source",
                do="report this",
            )
        return self.stdin.start()

    def _windows_of(self, file: int, dealer: Dealer, joiner: SpanJoiner, writer: _Writer) -> Iterator[Window]:
        """The windows that are filled by rows of this file, spooled; the last one stays under way."""
        cutter = Cutter(self.decoder.rules, at_file_start=True)
        writer.written_to = None
        base = 0
        handle = self._open(file)
        try:
            handed = blocks(handle, path=self.files[file].path, block_bytes=self.block_bytes)
            for block in itertools.chain(handed, [b""]):
                skipping = dealer.skip
                cut = cutter.feed(block) if block else cutter.finish()
                if writer.written_to is None and cutter.body_start is not None and skipping <= cut.num_records:
                    writer.written_to = int(cut.ends[skipping - 1]) if skipping else cutter.body_start
                for share in dealer.shares(cut):
                    writer.write(block, base, share.stop)
                    joiner.add(
                        file=file,
                        start=writer.position(share.start),
                        stop=writer.position(share.stop),
                        rows=share.rows,
                        line=share.line,
                    )
                    if share.last:
                        yield writer.close()
                if dealer.done:
                    return
                base += len(block)
                writer.write(block, base - len(block), base)
        finally:
            handle.close()

    def _records(self, path: Path, window: Window) -> Iterator[Record]:
        with path.open("rb") as handle:
            for span in window.spans:
                cutter = Cutter(self.decoder.rules, offset=span.start, line=span.first_line)
                handed = blocks(handle, path=str(path), start=span.start, stop=span.stop, block_bytes=self.block_bytes)
                yield from read_records(handed, cutter, file=span.file, offset=span.start)
