"""Requests to an S3 endpoint: repeated while a server that answered before does not; what fails is one sentence."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from trimtab.base import progress
from trimtab.base.errors import StoreError, Unreachable
from trimtab.store import clock
from trimtab.store.clock import Late
from trimtab.store.s3_client import connect
from trimtab.store.s3_errors import explain_code, explain_connection
from trimtab.store.transfer import Meter

#: A server that has answered once is waited for so many seconds after its last answer: it may be restarting.
PATIENCE = 60.0

Result = TypeVar("Result")


class Requests:
    """What is asked of one bucket, by `client` and `http` of its connection; several threads may ask.

    Args:
        bucket: whose name messages tell.
        environment, read_timeout, retries: see `trimtab.store.s3_client.connect`.
    """

    def __init__(self, bucket: str, environment: Mapping[str, str], read_timeout: float, retries: int):
        connection = connect(environment, read_timeout, retries)
        self.bucket, self.endpoint, self._secrets = bucket, connection.endpoint, connection.secrets
        self.client, self.http = connection.client, connection.http
        self._heard: float | None = None  # when the server last answered

    def heard(self) -> None:
        """Notes that the server has answered just now."""
        self._heard = time.monotonic()

    def insist(self, what: str, action: Callable[[], Result], meter: Meter | None = None) -> Result:
        """Returns what an action returns; repeats it while a server that has answered before does not.

        Raises:
            StoreError: what the action met, in one sentence.
        """
        pause = 0.25
        while True:
            try:
                with self.explained(what):
                    result = action()
                self.heard()
                return result
            except Unreachable as error:
                if self._heard is None or time.monotonic() - self._heard > PATIENCE:
                    raise
                progress.report("store", f"waiting up to {PATIENCE:.0f} s: {error}")
            if meter:
                meter.touch()
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def put_if_absent(self, key: str, name: str, data: bytes, before: float | None = None) -> bool:
        """Writes the object of that name unless there is one already; returns whether it wrote. `key` is for messages.

        The minio client's public calls do not pass If-None-Match on, so this is a presigned request. It is sent
        once: a second sending could meet the object of the first.
        """
        before = clock.now() + 300 if before is None else before
        return self.timed("PUT", key, name, before, data, {"If-None-Match": "*"}) not in (409, 412)

    def timed(
        self,
        method: str,
        key: str,
        name: str,
        before: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """Sends a request once that the server refuses after `before`, seconds since 1970, and returns its status.

        It is presigned, and the signature says when it ends. So it does no harm, however long this process was
        suspended between looking at the clock and sending it. urllib3 does not repeat it, for it would log the address.

        Raises:
            Late: it is too late for it.
        """
        what, signed = f"{'remove' if method == 'DELETE' else 'write'} {key}", clock.now()
        left = math.floor(before - signed)
        if left < 1:
            raise Late(f"{what}: the right to do it has run out; run it again")
        when = datetime.fromtimestamp(signed, UTC)
        with self.explained(what):
            url = self.client.get_presigned_url(method, self.bucket, name, timedelta(seconds=left), request_date=when)
            answer = self.http.request(method, url, body=body, headers=dict(headers or {}), retries=False)
        if answer.status == 403 and b"expired" in answer.data.lower():
            raise Late(f"{what}: the right to do it has run out; run it again")
        if answer.status >= 300 and answer.status not in ((404,) if method == "DELETE" else (409, 412)):
            code = re.search(rb"<Code>(\w+)</Code>", answer.data)
            code = code.group(1).decode() if code else f"HTTP {answer.status}"
            raise explain_code(code, "", what, self.endpoint, self.bucket)
        return answer.status

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turns what the client raises into one sentence without a credential."""
        from xml.etree.ElementTree import ParseError

        import minio.error
        import urllib3.exceptions

        try:
            yield
        except minio.error.S3Error as error:
            message = error.message or ""
            for value in self._secrets:
                message = message.replace(value, "***")
            raise explain_code(error.code or "", message, what, self.endpoint, self.bucket) from None
        except minio.error.ServerError as error:
            raise explain_code(f"HTTP {error.status_code}", "", what, self.endpoint, self.bucket) from None
        except (minio.error.MinioException, ParseError):
            problem = f"{self.endpoint} does not answer like S3: correct AWS_ENDPOINT_URL"
            raise StoreError(f"cannot {what}: {problem}") from None
        except urllib3.exceptions.HTTPError as error:
            raise explain_connection(error, what, self.endpoint) from None


@contextlib.contextmanager
def absent() -> Iterator[None]:
    """Swallows the answer that there is no such object, and with it the `return` inside."""
    from minio.error import S3Error

    try:
        yield
    except S3Error as error:
        if error.code not in ("NoSuchKey", "NoSuchObject", "ResourceNotFound"):
            raise
