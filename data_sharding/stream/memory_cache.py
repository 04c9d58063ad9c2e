"""A cache of decompressed frames in memory, bounded in bytes."""

from collections import OrderedDict

from data_sharding.format.shard import RawFrame

FrameKey = tuple[int, int]  # (dataset, frame of its manifest)


class MemoryCache:
    """An LRU cache of decompressed frames, of at most ``max_bytes`` (at least one frame is kept)."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._frames: OrderedDict[FrameKey, RawFrame] = OrderedDict()
        self._bytes = 0

    def __contains__(self, frame: FrameKey) -> bool:
        return frame in self._frames

    def __len__(self) -> int:
        return len(self._frames)

    def get(self, frame: FrameKey) -> RawFrame:
        """The frame, which is then the most recently used one. Raises KeyError if it is not here."""
        self._frames.move_to_end(frame)
        return self._frames[frame]

    def put(self, frame: FrameKey, raw: RawFrame) -> None:
        """Adds a frame and evicts the least recently used ones until the rest fits."""
        if frame not in self._frames:
            self._frames[frame], self._bytes = raw, self._bytes + raw.nbytes
        self._frames.move_to_end(frame)
        while self._bytes > self.max_bytes and len(self._frames) > 1:
            self._bytes -= self._frames.popitem(last=False)[1].nbytes
