"""URLs as users write them: one spelling for each store, and none that holds a password."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from fanfold.data.failures import inert
from fanfold.errors import PlanError

_SAME = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}  # Hadoop's and gcsfs's names for the same stores
# What signs a request or opens a session, in the query of a URL.
_SIGNED = re.compile(r"[?&](x-amz-(signature|security-token)|x-goog-signature|sig|token|access_token)=", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether a file system of fsspec is meant rather than the local one."""
    return "://" in path


def scheme_of(url: str) -> str:
    """What stands before "://", in the spelling that is kept."""
    scheme = url.partition("://")[0].lower()
    return _SAME.get(scheme, scheme)


def plain_url(url: str) -> str:
    """The URL as it is recorded and compared. PlanError where it holds a secret: those come from the environment."""
    scheme, _, rest = url.partition("://")
    try:
        holds_password = urlsplit(url).password is not None or (scheme_of(url) == "s3" and "@" in urlsplit(url).netloc)
    except ValueError:
        holds_password = "@" in rest.partition("/")[0]
    if holds_password or _SIGNED.search(url):
        shown = f"{scheme}://...{rest.rpartition('@')[2].partition('?')[0]}"
        raise PlanError(
            f"the URL {inert(shown)}",
            found="it holds a password, a key or a signature; URLs are written to run.json",
            allowed="URLs without secrets",
            do="leave it away; give credentials through the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...)",
        )
    return f"{scheme_of(url)}://{rest}"


def split_bucket(url: str) -> tuple[str, str]:
    """(bucket, prefix without slashes at its ends) of s3://bucket/prefix."""
    bucket, _, prefix = url.partition("://")[2].partition("/")
    return bucket, prefix.strip("/")
