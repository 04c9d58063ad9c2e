"""A RUN's store in a bucket: conditional creates by single-part PUT, large objects by multipart upload.

All requests go through ``retry``, the one place that retries. Each part carries its MD5, which every S3 server checks
(some ignore the checksums of newer clients), so what was acknowledged is what was sent. What is read is checked by the
digests of the caller.
"""

import base64
import hashlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.failures import refused, unreachable
from data_sharding.storage.filesystems import file_system
from data_sharding.storage.retry import RetriesExhausted, RetryPolicy, call_with_retry
from data_sharding.storage.store import Bytes, Result, Store, Writable

PART = 16 << 20  # bytes of a part; larger where the object would have more than 10,000 of them, which S3 refuses
_MOST_PARTS = 10_000
_IN_FLIGHT = 4  # parts being sent while the next one is filled: memory is one part more
_SINGLE = 1 << 40  # s3fs splits what is larger; a conditional create must be one part


class S3Store(Store):
    """``policy`` is for each request. A refusal is retried (credentials are renewed during a run), but not before the
    first successful request: then the credentials are wrong."""

    def __init__(self, url: str, policy: RetryPolicy = RetryPolicy(deadline=120, attempt=30)) -> None:  # noqa: B008
        self.url = url.rstrip("/")
        self._policy, self._authorized = policy, False
        if not self.url.removeprefix("s3://").partition("/")[2]:
            raise UserError(f"{url} names no folder in the bucket: give s3://BUCKET/FOLDER.")
        file_system(self.url)  # raises at once if s3fs is not installed

    def read_range(
        self,
        path: str,
        begin: int | None,
        end: int | None,
        check: Callable[[Bytes], Result],
        buffer: bytearray | None = None,
    ) -> Result:
        # One request: for a whole object s3fs would first ask for its size, and trust its cache.
        return self._request("cat_file", path, start=begin, end=end, max_concurrency=1, check=check)

    def size(self, path: str) -> int:
        found = self._request("info", path, refresh=True)
        if found["type"] != "file":
            raise FileNotFoundError(self.path(path))
        return found["size"]

    def create(self, path: str, data: bytes) -> None:
        self._write("pipe_file", path, data, chunksize=_SINGLE, mode="create", ContentMD5=_md5(data))

    def put(self, path: str, data: bytes) -> None:
        self._write("pipe_file", path, data, chunksize=_SINGLE, ContentMD5=_md5(data))

    @contextmanager
    def writing(self, path: str, size: int) -> Generator[Writable]:
        if size <= PART:
            whole = _Buffer()
            yield whole
            self.put(path, bytes(whole.data))
            return
        upload = self._write(_create_upload, path)
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="upload") as pool:
            parts = _Parts(max(PART, -(-size // _MOST_PARTS)), pool, partial(self._request, _send_part, path, upload))
            try:
                yield parts
                tags = parts.finish()
                assert parts.bytes == size, f"{path}: {parts.bytes} bytes were written, {size} announced"
                self._complete(path, upload, tags, size)
            except BaseException:
                parts.cancel()
                with suppress(Exception):  # `checkpoint sweep` aborts what is left
                    self._request(_abort_upload, path, upload, policy=replace(self._policy, deadline=5))
                raise

    def _complete(self, path: str, upload: str, tags: list[str], size: int) -> None:
        try:
            self._request(_complete_upload, path, upload, tags)
        except FileNotFoundError:  # no such upload: perhaps an earlier reply was lost
            if not self.exists(path) or self.size(path) != size:
                raise

    def list(self, prefix: str) -> list[str]:
        folder, _, name = prefix.rpartition("/")
        start = len(self.url.removeprefix("s3://")) + 1
        try:
            found = self._request("find", folder, prefix=name)
        except FileNotFoundError:
            return []
        return sorted(path for path in (key[start:] for key in found) if path.startswith(prefix))

    def _delete_tree(self, path: str) -> None:
        for key in self.list(path.rstrip("/") + "/"):
            self._request("rm_file", key)

    def uploads(self) -> Sequence[tuple[str, str]]:
        start = len(self.url.removeprefix("s3://").partition("/")[2]) + 1
        return [(key[start:], upload) for key, upload in self._request(_list_uploads, "")]

    def abort_upload(self, path: str, upload: str) -> None:
        with suppress(FileNotFoundError):
            self._request(_abort_upload, path, upload)

    def _write(self, method: Any, path: str, *args: Any, **kw: Any) -> Any:
        try:
            return self._request(method, path, *args, **kw)
        except FileNotFoundError as error:
            raise UserError(f"the bucket of {self.url} does not exist: create it first.") from error

    def _request(
        self,
        method: Any,
        path: str,
        *args: Any,
        check: Callable[[Any], Any] = lambda result: result,
        policy: RetryPolicy | None = None,
        **kw: Any,
    ) -> Any:
        policy = replace(policy or self._policy, retry_refused=self._authorized)
        try:
            result = call_with_retry(policy, self.path(path), method, *args, check=check, **kw)
        except RetriesExhausted as error:
            raise unreachable(self.path(path), error, local=False) from error
        except PermissionError as error:
            raise refused(self.path(path), error) from error
        self._authorized = True
        return result


class _Buffer:
    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Bytes) -> None:
        self.data += data


class _Parts:
    """Cuts a stream into parts of ``part`` bytes and hands them to ``send(number, data)``, which returns a tag."""

    def __init__(self, part: int, pool: ThreadPoolExecutor, send: Callable[[int, bytearray], str]) -> None:
        self._part, self._pool, self._send = part, pool, send
        self._buffer, self._in_flight, self._tags = bytearray(), deque[Future[str]](), list[str]()
        self._number = self.bytes = 0

    def write(self, data: Bytes) -> None:
        data = memoryview(data)
        self.bytes += len(data)
        while len(data):
            room = self._part - len(self._buffer)
            self._buffer += data[:room]
            data = data[room:]
            if len(self._buffer) == self._part:
                self._send_buffer()

    def finish(self) -> list[str]:
        """The tags of all parts, in their order."""
        if self._buffer:
            self._send_buffer()
        while self._in_flight:
            self._tags.append(self._in_flight.popleft().result())
        return self._tags

    def cancel(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _send_buffer(self) -> None:
        if len(self._in_flight) == _IN_FLIGHT:
            self._tags.append(self._in_flight.popleft().result())
        self._number += 1
        self._in_flight.append(self._pool.submit(self._send, self._number, self._buffer))
        self._buffer = bytearray()


# Requests that s3fs has no method for: coroutines of (file system, path, …).


async def _create_upload(fs: Any, path: str) -> str:
    bucket, key, _ = fs.split_path(path)
    return (await fs._call_s3("create_multipart_upload", Bucket=bucket, Key=key))["UploadId"]


async def _send_part(fs: Any, path: str, upload: str, number: int, data: bytearray) -> str:
    bucket, key, _ = fs.split_path(path)
    where = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": number}
    return (await fs._call_s3("upload_part", **where, Body=data, ContentMD5=_md5(data)))["ETag"]


async def _complete_upload(fs: Any, path: str, upload: str, tags: list[str]) -> None:
    bucket, key, _ = fs.split_path(path)
    parts = {"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]}
    await fs._call_s3("complete_multipart_upload", Bucket=bucket, Key=key, UploadId=upload, MultipartUpload=parts)


async def _abort_upload(fs: Any, path: str, upload: str) -> None:
    bucket, key, _ = fs.split_path(path)
    await fs._call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)


async def _list_uploads(fs: Any, path: str) -> list[tuple[str, str]]:
    bucket, key, _ = fs.split_path(path)
    found, marker = [], {}
    while True:
        page = await fs._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **marker)
        found += [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", ())]
        if not page.get("IsTruncated"):
            return found
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _md5(data: bytes | bytearray) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
