"""From inputs as a user names them to a source."""

from __future__ import annotations

import contextlib
import itertools
import sys
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from fanfold.data.csv import csv_decoder, read_header
from fanfold.data.filerows import FileRows, RowDecoder
from fanfold.data.jsonl import jsonl_decoder
from fanfold.data.lines import BLOCK_BYTES, Cutter, Rules, blocks
from fanfold.data.listing import STDIN, compression, list_inputs
from fanfold.data.parquet import parquet_source, parquet_tables
from fanfold.data.records import Decoder, LineSource, Record, read_records
from fanfold.data.spool import Replay, SpoolSource, open_stream
from fanfold.data.text import text_decoder
from fanfold.errors import InputError, RequestError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from fanfold.data.reading import Reading
    from fanfold.data.source import Form, InputFile, Source


def open_source(
    inputs: Sequence[str],
    *,
    column: Reading = "text",
    id_column: str | None = None,
    keep: Literal["all", "none"] | Sequence[str] = "all",
    form: Form = "typed",
    spool: Path | None = None,
    limit: int | None = None,
    stdin: BinaryIO | None = None,
    reserved: Sequence[str] = (),
    block_bytes: int = BLOCK_BYTES,
) -> Source:
    """The rows of all inputs as one source, its schema fixed, its columns checked.

    `spool` is the folder for windows of compressed or streamed inputs; `limit` takes the first rows only;
    `stdin` stands in for standard input; `reserved` are names that a kept column must not have.
    Raises: InputError, RequestError.
    """
    listing = list_inputs(inputs)
    files = listing.files
    wanted: str | tuple[str, ...] = keep if isinstance(keep, str) else tuple(dict.fromkeys(keep))
    settings: dict[str, Any] = {"column": column, "id_column": id_column, "keep": wanted, "form": form}
    if listing.family == "parquet":
        source = parquet_source(files, limit=limit, **settings)
        _check_names(source.kept.names, reserved)
        return source
    replay = Replay(stdin or sys.stdin.buffer) if files[0].path == STDIN else None
    decoder: Decoder
    if listing.family == "text":
        decoder = text_decoder(**settings)
        _check_names(["text"] if wanted == "all" else wanted, reserved)
    elif listing.family == "csv":
        headers = [(f.path, h) for f in files if (h := _header(f.path, block_bytes)) is not None]
        decoder = csv_decoder(headers, **settings)
        _check_names(decoder.kept, reserved)
    else:
        with contextlib.closing(_heads(files, replay, block_bytes)) as heads:
            taken = itertools.islice(heads, limit)
            decoder = jsonl_decoder(taken, files, reserved=frozenset(reserved), **settings)
        _check_names(decoder.seen, reserved)
    if replay or any(compression(file.path) for file in files):
        return SpoolSource(
            files=files, decoder=decoder, spool=spool, limit=limit, block_bytes=block_bytes, stdin=replay
        )
    return LineSource(files=files, decoder=decoder, limit=limit, block_bytes=block_bytes)


def open_rows(inputs: Sequence[str], spool: Path, *, block_bytes: int = BLOCK_BYTES) -> FileRows:
    """The rows of all inputs as they stand there; `spool` is the folder for windows of compressed ones.

    Raises: InputError.
    """
    listing = list_inputs(inputs)
    files = listing.files
    if listing.family == "parquet":
        return FileRows(source=parquet_tables(files))
    names: tuple[str, ...] = ()
    if listing.family == "csv":
        headers = [(file.path, found) for file in files if (found := _header(file.path, block_bytes)) is not None]
        names = headers[0][1] if headers else ()
        for path, header in headers:
            if header != names:
                raise InputError(
                    f"the rows of {path}",
                    found=f"the header {', '.join(header)}",
                    allowed=f"that of {headers[0][0]}: {', '.join(names)}",
                    do="read files with different columns one after the other",
                )
    decoder = RowDecoder(rules=listing.family, names=names)
    if any(compression(file.path) for file in files):
        return FileRows(source=SpoolSource(files=files, decoder=decoder, spool=spool, block_bytes=block_bytes))
    return FileRows(source=LineSource(files=files, decoder=decoder, block_bytes=block_bytes))


def _check_names(kept: Sequence[str], reserved: Sequence[str]) -> None:
    clash = [name for name in reserved if name in kept]
    if clash:
        raise RequestError(
            f"result column(s) {', '.join(clash)}",
            found=f"the input has columns of that name: {', '.join(kept)}",
            allowed="names that the kept columns do not have",
            do="rename the results with --prefix new_, or keep fewer columns with --keep",
        )


def _heads(files: Sequence[InputFile], replay: Replay | None, block_bytes: int) -> Generator[Record]:
    """The records of all files from the first on, read as far as they are taken."""
    for index, file in enumerate(files):
        handle = replay.peek() if replay else open_stream(file.path)
        try:
            yield from _records(handle, index, file.path, "jsonl", block_bytes)
        finally:
            handle.close()


def _header(path: str, block_bytes: int) -> tuple[str, ...] | None:
    """The header of a CSV file, None where the file has no record at all."""
    handle = open_stream(path)
    try:
        block_at_a_time = min(block_bytes, 1 << 16)
        for record in _records(handle, 0, path, "csv", block_at_a_time):
            return read_header(record.data or b"", path)
    finally:
        handle.close()
    return None


def _records(handle: BinaryIO, file: int, path: str, rules: Rules, block_bytes: int) -> Iterator[Record]:
    """Every record of a stream from its beginning, a header too."""
    cutter = Cutter(rules, at_file_start=True, passes_header=False)
    handed = blocks(handle, path=path, block_bytes=block_bytes)
    return read_records(handed, cutter, file=file, offset=0)
