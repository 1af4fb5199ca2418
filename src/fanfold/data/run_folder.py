"""Where a run folder is: what travels to units, which open it there, on a disk or in an object store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from fanfold.data.durable import PosixStore
from fanfold.data.urls import is_url, plain_url, scheme_of, split_bucket
from fanfold.errors import PlanError

if TYPE_CHECKING:
    from fanfold.data.objects import Objects
    from fanfold.data.store import Store

PAUSE_S = 0.5  # before a store that did not answer is asked again


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """An absolute path, or the URL of a prefix in an object store. `scratch`: for local files of a remote one."""

    place: str
    sync: bool = True
    scratch: Path | None = None

    @property
    def remote(self) -> bool:
        return is_url(self.place)

    def open(self) -> Store:
        """The folder's store. A remote one is kept by the process, with the copies that it has fetched."""
        if not self.remote:
            return PosixStore(Path(self.place), sync=self.sync)
        key = (self, os.getpid())
        if key not in _OPENED:
            for old in [*_OPENED]:  # of another job, or of the process that this one was forked from
                store = _OPENED.pop(old)
                if old[1] == os.getpid():
                    store.close()
            _OPENED[key] = self._open_remote()
        return _OPENED[key]

    def open_to_write(self) -> Store:
        """A store of the caller's own, to be claimed and closed."""
        return self._open_remote() if self.remote else PosixStore(Path(self.place), sync=self.sync)

    def _open_remote(self) -> Store:
        from fanfold.data.staged import StagedStore

        objects, root = _objects(self.place)
        return StagedStore(objects, root, shown=self.place, scratch=self.scratch, pause_s=PAUSE_S)


_OPENED: dict[tuple[RunFolder, int], Store] = {}


def _objects(url: str) -> tuple[Objects, str]:
    """The objects of the URL's store, and its prefix among them."""
    bucket, prefix = split_bucket(url)
    if scheme_of(url) == "s3":
        from fanfold.data.s3 import S3Objects

        return S3Objects(bucket), prefix
    from fanfold.data.remote import FsspecObjects

    return FsspecObjects(scheme_of(url), bucket), prefix


def local_path(out: str | Path) -> Path | None:
    """The path that `out` names on this machine's file systems, file:// URLs included; None for other URLs."""
    text = os.fspath(out)
    if is_url(text):
        return Path(unquote(urlsplit(text).path)).absolute() if scheme_of(text) == "file" else None
    head = text.partition("/")[0]
    if isinstance(out, Path) and head.endswith(":") and len(head) > 2:
        raise PlanError(
            f"output to {text}",
            found="a URL that was made a Path, which has cut it",
            allowed="a path, or a URL as a string",
            do=f'give it as a string: "{head}//{text.partition("/")[2]}"',
        )
    return Path(out).absolute()


def remote_place(url: str) -> str:
    """The URL of a run folder in its one spelling. PlanError where it names no bucket, or a single file."""
    plain = plain_url(url).rstrip("/")
    bucket, prefix = split_bucket(plain)
    if not bucket or "?" in plain or "#" in plain:
        raise PlanError(
            f"output to {url}",
            found="no bucket, or a query" if not bucket else "a query behind the name",
            allowed="SCHEME://BUCKET/PREFIX",
            do="name a bucket and a prefix, for example: -o s3://bucket/out",
        )
    if prefix.endswith((".parquet", ".jsonl", ".csv")):
        raise PlanError(
            f"output to {plain}",
            found="one file in an object store",
            allowed="a prefix, which holds the output as data/part-*.parquet; one file only on a disk",
            do=f"leave the suffix away: -o {plain.rpartition('.')[0]}",
        )
    return plain
