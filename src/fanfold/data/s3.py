"""Objects in S3, or in a store that speaks its language: five calls of botocore, each one request.

botocore rather than s3fs, because everything rests on the conditional put: here it is sent once, its answer is
seen as it came, and no cache of listings stands in between. A retry inside the client would be answered "taken"
by the client's own first try; so a conditional put is never retried here, but by `ObjectStore`, which looks at
what stands there. Credentials and endpoint come from the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, ...), an instance's role included, and are never written anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fanfold import extras
from fanfold.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.data.objects import Blob

T = TypeVar("T")

_MANY = 1000  # names in one request for deletion


class S3Objects:
    """Implements data.objects.Objects for one bucket."""

    def __init__(self, bucket: str) -> None:
        purpose = f"output to s3://{bucket}"
        session = extras.need("botocore.session", extra="s3", purpose=purpose).get_session()
        config = extras.need("botocore.config", extra="s3", purpose=purpose).Config(
            connect_timeout=10, read_timeout=60, max_pool_connections=16, retries={"total_max_attempts": 4}
        )
        self.bucket = bucket
        self._client = self._asking(None, lambda: session.create_client("s3", config=config))
        once = config.merge(type(config)(retries={"total_max_attempts": 1}))
        self._once = self._asking(None, lambda: session.create_client("s3", config=once))

    def get(self, name: str) -> bytes | None:
        def read() -> bytes:
            body: bytes = self._client.get_object(Bucket=self.bucket, Key=name)["Body"].read()
            return body

        return self._asking(name, read, missing=None)

    def put(self, name: str, data: Blob) -> None:
        self._asking(name, lambda: self._client.put_object(Bucket=self.bucket, Key=name, Body=data))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        def put() -> bool:
            self._once.put_object(Bucket=self.bucket, Key=name, Body=data, IfNoneMatch="*")
            return True

        return self._asking(name, put, taken=False)

    def list(self, prefix: str) -> list[str]:
        def read() -> list[str]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return sorted(found["Key"] for page in pages for found in page.get("Contents", ()))

        return self._asking(prefix, read)

    def size_bytes(self, name: str) -> int | None:
        return self._asking(
            name, lambda: int(self._client.head_object(Bucket=self.bucket, Key=name)["ContentLength"]), missing=None
        )

    def delete(self, *names: str) -> None:
        if len(names) == 1:
            self._asking(names[0], lambda: self._client.delete_object(Bucket=self.bucket, Key=names[0]))
            return
        for start in range(0, len(names), _MANY):
            keys = [{"Key": name} for name in names[start : start + _MANY]]
            wanted = {"Objects": keys, "Quiet": True}
            reply = self._asking(names[start], lambda: self._client.delete_objects(Bucket=self.bucket, Delete=wanted))  # noqa: B023
            failed = reply.get("Errors", ())
            if failed:
                raise OSError(f"{len(failed)} objects were not deleted: {failed[0].get('Code')}")

    def _asking(self, name: str | None, call: Callable[[], T], **answers: Any) -> T:
        """The call's answer; `missing` and `taken` are what two refusals mean. OSError: no answer, or a busy store.

        Of an error only its code is shown: messages may hold names of keys, and addresses.
        """
        from botocore import exceptions

        try:
            return call()
        except exceptions.ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            if status == 404 and code != "NoSuchBucket" and "missing" in answers:
                return answers["missing"]  # type: ignore[no-any-return]
            if status == 412 and "taken" in answers:
                return answers["taken"]  # type: ignore[no-any-return]
            if status == 501 or (code == "NotImplemented" and "taken" in answers):
                raise NotImplementedError(code) from None
            if status in (409, 429) or status >= 500 or code == "RequestTimeout":
                raise OSError(f"{code} ({status})") from None
            self._refused(name, f"{code} ({status})")
        except (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
            exceptions.ProfileNotFound,
            exceptions.ParamValidationError,
            exceptions.NoRegionError,
        ) as error:
            self._refused(name, type(error).__name__)
        except (exceptions.BotoCoreError, exceptions.HTTPClientError) as error:
            raise OSError(type(error).__name__) from None
        except ValueError:  # an endpoint that is no URL
            self._refused(name, "an endpoint that is no URL (AWS_ENDPOINT_URL)")

    def _refused(self, name: str | None, found: str) -> NoReturn:
        raise StorageError(
            f"asking the store for s3://{self.bucket}/{name or ''}",
            found=found,
            allowed="a bucket that exists, and credentials that may list, read, write and delete in it",
            do="check the bucket's name, AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and AWS_REGION",
        ) from None
