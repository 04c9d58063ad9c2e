"""Digests of the chunks of a commit's files: every part that any rank reads is checked as it is read."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from data_sharding.storage.retry import CorruptRead
from data_sharding.storage.store import Bytes, Store

CHUNK = 16 << 20  # bytes, each with its own digest
_AHEAD = 4  # chunks that are fetched while one is used


class Damaged(Exception):
    """A file of a commit is missing, or not as it was committed; the message names it."""


class ChunkDigests:
    """xxh3_128 of each ``CHUNK`` bytes of a stream, the last of which may be shorter."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._digest, self._left = xxhash.xxh3_128(), CHUNK

    def update(self, data: Bytes) -> None:
        data = memoryview(data)
        while len(data):
            head = data[: self._left]
            self._digest.update(head)
            self._left -= len(head)
            data = data[len(head) :]
            if self._left == 0:
                self._done.append(self._digest.hexdigest())
                self._digest, self._left = xxhash.xxh3_128(), CHUNK

    def hexdigests(self) -> list[str]:
        return self._done + ([self._digest.hexdigest()] if self._left < CHUNK else [])


@dataclass(frozen=True)
class FileSpan:
    """Bytes [begin, end) of a file of a commit."""

    file: str
    begin: int
    end: int

    @property
    def chunks(self) -> range:
        return range(self.begin // CHUNK, -(-self.end // CHUNK))


class ChunkReader:
    """Reads files below ``folder``, described as in a manifest: {"name": {"bytes": 7120, "xxh3_128": ["9f…", …]}}."""

    def __init__(self, store: Store, folder: str, files: dict[str, dict]) -> None:
        self._store, self._folder, self._files = store, folder, files

    def chunk(self, file: str, index: int, buffer: bytearray | None = None) -> Bytes:
        """One chunk, checked; in ``buffer`` if it is large enough and the store can read into it. Raises Damaged."""
        recorded = self._files[file]
        begin = index * CHUNK
        end = min(begin + CHUNK, recorded["bytes"])

        def check(data: Bytes) -> Bytes:
            digest = xxhash.xxh3_128_hexdigest(data)
            if len(data) != end - begin:
                raise CorruptRead(f"{file} ends before its {recorded['bytes']} bytes", digest)
            if digest != recorded["xxh3_128"][index]:
                raise CorruptRead(f"{file} does not match its digest at bytes {begin} to {end}", digest)
            return data

        try:
            return self._store.read_range(f"{self._folder}/{file}", begin, end, check, buffer)
        except FileNotFoundError:
            raise Damaged(f"{file} is missing") from None
        except CorruptRead as error:
            cause = str(error) if file in str(error) else f"{file}: {error}"
            raise Damaged(cause) from None

    def check_size(self, file: str) -> None:
        """Raises Damaged if the file is missing, or not as long as recorded. Does not read it."""
        try:
            size = self._store.size(f"{self._folder}/{file}")
        except FileNotFoundError:
            raise Damaged(f"{file} is missing") from None
        if size != self._files[file]["bytes"]:
            raise Damaged(f"{file} has {size} bytes, not {self._files[file]['bytes']}")

    def fill(self, spans: Sequence[FileSpan], memory: Callable[[int], memoryview]) -> Iterator[int]:
        """Reads each span into ``memory(its index)``, in order, and yields the index; fastest if the spans are sorted.
        Raises Damaged, having written nothing that was not checked.

        Each chunk is fetched once, a few ahead of their use, into buffers that are reused. Memory holds these buffers,
        and the chunks that a later span needs again.
        """
        uses = Counter((span.file, n) for span in spans for n in span.chunks)
        largest = max([0, *(min(CHUNK, self._files[file]["bytes"] - n * CHUNK) for file, n in uses)])
        ahead, fetched = iter(list(uses)), dict[tuple[str, int], Future[Bytes]]()
        buffers: dict[tuple[str, int], bytearray] = {}
        free: list[bytearray] = []
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="chunks") as pool:
            try:
                for index, span in enumerate(spans):
                    data = memory(index)
                    for n in span.chunks:
                        key = (span.file, n)
                        while key not in fetched or len(fetched) < _AHEAD:
                            if (following := next(ahead, None)) is None:
                                break
                            buffers[following] = free.pop() if free else bytearray(largest)
                            fetched[following] = pool.submit(self.chunk, *following, buffers[following])
                        chunk, begin = memoryview(fetched[key].result()), n * CHUNK
                        low, high = max(span.begin, begin), min(span.end, begin + len(chunk))
                        data[low - span.begin : high - span.begin] = chunk[low - begin : high - begin]
                        uses[key] -= 1
                        if not uses[key]:
                            del fetched[key]
                            free.append(buffers.pop(key))
                    yield index
            finally:
                pool.shutdown(cancel_futures=True)
