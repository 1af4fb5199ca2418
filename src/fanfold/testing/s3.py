"""An S3-compatible server on loopback for tests: moto's, with faults, and one request at a time.

    with S3Server() as server:
        server.make_bucket("bucket")
        os.environ.update(server.environment)
        run_job(task, Request(out="s3://bucket/out", ...))

One at a time, because moto looks whether a name is taken and puts then: its conditional put is atomic only so.
Objects live in this process. Buckets of one process are all in one place, whatever the server.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from fanfold import extras

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

KEY, SECRET = "test-key-of-nobody", "test-secret-of-nobody"


class S3Server:
    """The server, its address in `environment`, and what it was asked: `requests` counts by method."""

    def __init__(self) -> None:
        purpose = "an S3-compatible server for tests"
        app = extras.need("moto.moto_server.werkzeug_app", extra="test", purpose=purpose)
        serving = extras.need("werkzeug.serving", extra="test", purpose=purpose)

        class Quiet(app.MotoRequestHandler):  # type: ignore[name-defined, misc]
            def log_request(self, code: Any = "-", size: Any = "-") -> None:
                pass

        self.requests: Counter[str] = Counter()
        self._app = app.DomainDispatcherApplication(app.create_backend_app)
        self._faults: list[tuple[str, str, bool]] = []
        self._lock = threading.Lock()
        self._server = serving.make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the server needs, and nothing of this machine's own settings."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "NO_PROXY": "127.0.0.1",
        }

    def make_bucket(self, name: str) -> Any:
        """The bucket is there; returns a client of the server, for looking and for doing damage."""
        session = extras.need("botocore.session", extra="s3", purpose="a client of the server").get_session()
        client = session.create_client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )
        client.create_bucket(Bucket=name)
        return client

    def fail(self, method: str, status: str = "500 Internal Server Error", *, after: bool = False) -> None:
        """The next request of this method is answered so; with `after`, when it has taken effect."""
        self._faults.append((method, status, after))

    def __enter__(self) -> S3Server:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join(timeout=10)
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        with self._lock:
            self.requests[method] += 1
            fault = next((fault for fault in self._faults if fault[0] == method), None)
            if fault is not None:
                self._faults.remove(fault)
                if fault[2]:
                    b"".join(self._app(environ, lambda *_: None))
                start_response(fault[1], [("Content-Length", "0")])
                return [b""]
            answer = self._app(environ, start_response)
            try:
                return [b"".join(answer)]
            finally:
                if hasattr(answer, "close"):
                    answer.close()
