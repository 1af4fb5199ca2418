"""Parquet files read onwards from any row, with a few readers kept where they stand."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fanfold.data.failures import inert
from fanfold.data.lines import changed
from fanfold.data.listing import look_up, open_binary
from fanfold.data.records import CHUNK_BYTES, CHUNK_ROWS
from fanfold.data.urls import is_url
from fanfold.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.data.source import InputFile

READ_BUFFER_BYTES = 1 << 20
MAX_OPEN = 2


def batches(file: InputFile, columns: tuple[str, ...], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) of the columns, from a reader that stands at `start` where this process has one.

    Raises: InputError where the file has changed or cannot be read.
    """
    if not is_url(file.path) and look_up(file.path) != file:
        raise changed(file.path, "another size or time of change than when it was listed")
    key = _Key(file, columns)
    reader = _READERS.pop(key, None)
    if reader is not None and reader.at != start:
        reader.close()
        reader = None
    reader = reader or _Reader(file.path, start, columns)
    try:
        while reader.at < stop:
            yield reader.take(stop - reader.at)
    except BaseException:  # an error, or the caller stopped in between
        reader.close()
        raise
    _READERS[key] = reader
    while len(_READERS) > MAX_OPEN:
        _READERS.popitem(last=False)[1].close()


def open_parquet(path: str) -> pq.ParquetFile:
    """Raises InputError where it is no readable Parquet file."""
    try:
        handle = open_binary(path) if is_url(path) else pa.OSFile(path)
        return pq.ParquetFile(handle, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> InputError:
    """The error for a file that is damaged or no Parquet at all."""
    return InputError(
        f"the input {inert(path)}",
        found=f"it cannot be read as Parquet: {inert(str(error))}",
        allowed="complete Parquet files",
        do="copy or write the file again",
    )


class _Key(NamedTuple):
    file: InputFile
    columns: tuple[str, ...]


class _Reader:
    """Batches of some columns of a file from a row on; stands at row `at`."""

    def __init__(self, path: str, row: int, columns: tuple[str, ...]) -> None:
        self.at = row
        self._columns = columns
        self._path = path
        self._file = open_parquet(path)
        group, first = 0, 0
        while first + self._file.metadata.row_group(group).num_rows <= row:
            first += self._file.metadata.row_group(group).num_rows
            group += 1
        self._batches = self._all(group)
        self._rest: pa.RecordBatch | None = None
        while first < row:
            first += self.take(row - first).num_rows
        self.at = row

    def take(self, most: int) -> pa.RecordBatch:
        """The next rows, at least one and at most `most`. Raises InputError where the file cannot be read."""
        try:
            batch = self._rest if self._rest is not None else next(self._batches)
        except StopIteration:
            raise changed(self._path, f"it ends at row {self.at}") from None
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self._path, error) from error
        self._rest = batch.slice(most) if batch.num_rows > most else None
        self.at += min(most, batch.num_rows)
        return batch.slice(0, most)

    def close(self) -> None:
        self._file.close(force=True)

    def _all(self, group: int) -> Iterator[pa.RecordBatch]:
        for index in range(group, self._file.metadata.num_row_groups):
            yield from self._file.iter_batches(
                batch_size=self._batch_rows(index),
                row_groups=[index],
                columns=list(self._columns),
                use_threads=False,
            )

    def _batch_rows(self, group: int) -> int:
        """Rows of about CHUNK_BYTES, by the row group's mean."""
        meta = self._file.metadata.row_group(group)
        wanted: int = CHUNK_BYTES * meta.num_rows // max(meta.total_byte_size, 1)
        return max(1, min(CHUNK_ROWS, wanted))


_READERS: OrderedDict[_Key, _Reader] = OrderedDict()  # of this process; a window mostly follows the one before


def footer(path: str) -> bytes:
    """The file's footer, which says where everything is and, with its statistics, changes with the content."""
    from fanfold.data.listing import open_binary

    with open_binary(path) as handle:
        size_bytes = handle.seek(0, 2)
        handle.seek(max(0, size_bytes - 8))
        tail = handle.read(8)
        length = int.from_bytes(tail[:4], "little")
        handle.seek(max(0, size_bytes - 8 - length))
        return handle.read(length + 8)
