"""The files that the inputs of a job name, in the order in which their rows count."""

from __future__ import annotations

import glob
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit

from fanfold.data.failures import inert
from fanfold.data.source import InputFile
from fanfold.data.urls import is_url, plain_url
from fanfold.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

Family = Literal["jsonl", "csv", "text", "parquet"]
STDIN = "-"
SUFFIXES: dict[str, Family] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSED = (".gz", ".zst")
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")  # whose errors are no OSErrors
_KNOWN = ".jsonl .ndjson .csv .txt (each also .gz or .zst), .parquet .pq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Files of one format family."""

    family: Family
    files: tuple[InputFile, ...]


def list_inputs(inputs: Sequence[str]) -> Listing:
    """Every file the inputs name, inputs in the order given, each expansion sorted bytewise.

    Raises: InputError for what is missing, unreadable, unknown or of mixed formats.
    """
    if STDIN in inputs:
        if len(inputs) > 1:
            raise InputError(
                f"the inputs are {' '.join(map(inert, inputs))}",
                found="'-' (standard input) beside other inputs",
                allowed="'-' alone, or files, folders, globs and URLs",
                do="give '-' alone, or name the files only",
            )
        return Listing(family="jsonl", files=(InputFile(path=STDIN, size_bytes=None, mtime_ns=None),))
    files = [file for given in inputs for file in (_of_url(plain_url(given)) if is_url(given) else _of_local(given))]
    if not files:
        raise InputError(
            "the job reads its inputs",
            found="no input was given",
            allowed="one or more files, folders, globs or URLs, or '-'",
            do="name an input, for example docs.jsonl",
        )
    family = _family(files[0].path)
    for file in files:
        if _family(file.path) != family:
            raise InputError(
                "the inputs are read as one sequence of rows",
                found=f"{inert(files[0].path)} is {family}, {inert(file.path)} is {_family(file.path)}",
                allowed="one format in a job: JSONL, CSV, plain text or Parquet (compressed or not)",
                do="run one job for each format, or convert the files to one format",
            )
    return Listing(family=family, files=tuple(files))


def compression(path: str) -> str | None:
    """`.gz`, `.zst` or None."""
    return next((suffix for suffix in COMPRESSED if _name(path).endswith(suffix)), None)


def open_binary(path: str) -> BinaryIO:
    """The file or URL opened for reading, unbuffered where it is local. Raises InputError."""
    try:
        if is_url(path):
            fs, inner = _file_system(path)
            return cast("BinaryIO", fs.open(inner, "rb"))
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        if not _is_of_a_library(error):
            raise
        raise _unanswered(path, error) from None


def _name(path: str) -> str:
    return (urlsplit(path).path if is_url(path) else path).lower()


def _known(path: str) -> Family | None:
    name = _name(path)
    packed = compression(path)
    family = SUFFIXES.get(os.path.splitext(name.removesuffix(packed) if packed else name)[1])
    return None if packed and family == "parquet" else family


def _family(path: str) -> Family:
    family = _known(path)
    if family is None:
        raise InputError(
            f"the input {inert(path)}",
            found="a file name whose suffix names no known format",
            allowed=_KNOWN,
            do="rename the file, convert it, or pipe JSONL into '-'",
        )
    return family


def _unreadable(path: str, error: OSError) -> InputError:
    found = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror or error)
    return InputError(
        f"the input {inert(path)}",
        found=inert(found),
        allowed="a file or folder that exists and that this user may read",
        do="check the path (quote a glob: '*.jsonl') and its permissions",
    )


def _is_of_a_library(error: Exception) -> bool:
    """Whether a store's own library has raised it."""
    return type(error).__module__.partition(".")[0] in _LIBRARIES


def _unanswered(url: str, error: Exception) -> InputError:
    """Of the error only its class is shown, for messages may hold addresses."""
    return InputError(
        f"the input {inert(url)}",
        found=f"the store cannot be asked: {type(error).__name__}",
        allowed="a store that answers, and credentials that may list and read",
        do="check the connection, the credentials and the endpoint (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)",
    )


def _of_local(given: str) -> list[InputFile]:
    path = os.path.abspath(given)
    if os.path.isdir(path):
        return _of_folder(given, path)
    if os.path.lexists(path) or not glob.has_magic(given):
        return [look_up(path)]
    found = sorted({os.path.abspath(p) for p in glob.glob(given, recursive=True)}, key=os.fsencode)
    files = [look_up(p) for p in found if not os.path.isdir(p)]
    if not files:
        raise InputError(
            f"the input {inert(given)}",
            found="no file matches this glob",
            allowed="a glob of *, ?, [...] and ** that matches at least one file",
            do=f"check it with: ls {inert(given)}",
        )
    return files


def _of_folder(given: str, path: str) -> list[InputFile]:
    own = os.path.isfile(os.path.join(path, "run.json")) and os.path.isdir(os.path.join(path, "data"))
    top = os.path.join(path, "data") if own else path

    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename or path, error) from error

    names: list[str] = []
    for folder, folders, plain in os.walk(top, onerror=refuse):
        folders[:] = [] if own else [f for f in folders if not f.startswith((".", "_"))]
        kept = [f for f in plain if (f.startswith("part-") if own else not f.startswith((".", "_")))]
        names += [os.path.join(folder, f) for f in kept if _known(f)]
    if not names:
        raise InputError(
            f"the input folder {inert(given)}",
            found="a run folder without a finished part" if own else "no file of a known format in it",
            allowed=f"a folder with files named {_KNOWN}; names starting with . or _ are skipped",
            do="check the folder, or name the files themselves",
        )
    return [look_up(name) for name in sorted(names, key=os.fsencode)]


def look_up(path: str) -> InputFile:
    """A local file as it is now. Raises InputError."""
    try:
        state = os.stat(path)
        if not os.access(path, os.R_OK):
            raise PermissionError(13, "permission denied", path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(state.st_mode):
        raise InputError(
            f"the input {inert(path)}",
            found="not a regular file (a pipe, a socket or a device)",
            allowed="regular files, or JSONL on standard input as '-'",
            do=f"cat {inert(path)} | fanfold ... -",
        )
    return InputFile(path=path, size_bytes=state.st_size, mtime_ns=state.st_mtime_ns)


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, inner = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"the input {inert(url)}",
            found=inert(str(error)),
            allowed="URLs whose protocol an installed fsspec package reads",
            do="install the package named above (s3:// needs s3fs, gs:// needs gcsfs, http:// needs aiohttp)",
        ) from error
    return fs, inner


def _of_url(url: str) -> list[InputFile]:
    fs, inner = _file_system(url)
    fs.invalidate_cache()  # another call of this process may have listed it before
    web = url.startswith(("http://", "https://"))
    try:
        if not web and glob.has_magic(inner) and not fs.exists(inner):
            paths = [p for p in fs.glob(inner) if not fs.isdir(p)]
        elif not web and fs.isdir(inner):
            top = inner.rstrip("/")
            if fs.isfile(f"{top}/run.json") and fs.isdir(f"{top}/data"):  # a run folder: its parts
                paths = [p for p in fs.find(f"{top}/data") if p.rpartition("/")[2].startswith("part-") and _known(p)]
            else:
                hidden = ("/.", "/_")
                paths = [p for p in fs.find(inner) if _known(p) and not any(h in p[len(top) :] for h in hidden)]
        else:
            return [_url_file(fs, inner, url)]
        if not paths:
            raise FileNotFoundError(url)
        return [_url_file(fs, p, fs.unstrip_protocol(p)) for p in sorted(paths, key=os.fsencode)]
    except OSError as error:
        raise _unreadable(url, error) from error
    except Exception as error:
        if not _is_of_a_library(error):
            raise
        raise _unanswered(url, error) from None


def _url_file(fs: Any, inner: str, url: str) -> InputFile:
    info = fs.info(inner)
    changed = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or info.get("updated")
    seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
    mtime_ns = int(seconds * 1e9) if isinstance(seconds, int | float) else None
    return InputFile(path=url, size_bytes=info.get("size"), mtime_ns=mtime_ns)
