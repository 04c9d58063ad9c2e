"""Decompressed frames in memory, bounded in bytes."""

from collections import OrderedDict

from data_sharding.format.shard import RawFrame

Frame = tuple[int, int]  # (dataset, frame of its manifest)


class MemoryCache:
    """Decompressed frames, least recently used out first, bounded in bytes (at least one frame is kept)."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._frames: OrderedDict[Frame, RawFrame] = OrderedDict()
        self._bytes = 0

    def __contains__(self, frame: Frame) -> bool:
        return frame in self._frames

    def __len__(self) -> int:
        return len(self._frames)

    def get(self, frame: Frame) -> RawFrame:
        self._frames.move_to_end(frame)
        return self._frames[frame]

    def put(self, frame: Frame, raw: RawFrame) -> None:
        if frame not in self._frames:
            self._frames[frame], self._bytes = raw, self._bytes + raw.nbytes
        self._frames.move_to_end(frame)
        while self._bytes > self.max_bytes and len(self._frames) > 1:
            self._bytes -= self._frames.popitem(last=False)[1].nbytes
