"""The measurements of a run as lines in files: written by the training thread, read by the uploader and by reports.

An attempt writes segments attempts/<n>/journal/00000.jsonl, 00001.jsonl, …, with one JSON object per line. Times are
milliseconds since 1970 UTC; steps count optimizer steps since the beginning of the run; pictures are paths relative to
the run folder. NaN and Infinity are written as such. The first line of an attempt, then examples of the others:

    {"attempt":3,"start_step":100}
    {"step":120,"time_ms":1732390000123,"metrics":{"loss":0.91,"grad_norm":NaN}}
    {"step":200,"time_ms":1732390050456,"picture":"samples/00000200.png"}

The canonical curve consists of the committed measurements. In the order of their claims, each attempt contributes the
records above the last step committed before it, up to the last step that it committed itself, whether or not that
COMMIT was RETIREd later. So a restart, even from an older checkpoint, gives one monotone curve without duplicates.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any

from data_sharding.storage.atomic_write import fsync_folder
from data_sharding.storage.files import with_local
from data_sharding.storage.records import Count, Shape
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import Run

_FLUSH_EVERY_S = 1.0
SEND_AGAIN = "remove it, and everything is sent again"  # the remedy for a damaged record of what was sent
_BIG = 1 << 63  # what no integer of a record reaches
log = logging.getLogger(__name__)

_encode = json.JSONEncoder(separators=(",", ":")).encode  # one encoder: creating it would double the cost of a record


class Journal:
    """Appends one attempt's records. The thread that records touches no file: the journal's own thread writes to the
    disk, and a third thread may ``seal``. A slow or full disk delays only ``seal``; until it can be written, records
    wait in memory. There they stay until they are durable: after an error they are written again, because what a file
    holds is then not known, and an open file may never work again.

    ``folder`` is the attempt's folder (``Attempt.folder``); ``upload`` uploads a sealed segment to a run on another
    storage (``Attempt.upload``). A killed process loses at most the last second, all of it after the last commit: call
    ``seal`` before the COMMIT entry is appended, when every record up to the committed step has been written.
    """

    def __init__(
        self, folder: Path, attempt: int, start_step: int, upload: Callable[[Path], None] = lambda segment: None
    ) -> None:
        self._folder, self._upload = folder / "journal", upload
        self._segment, self._uploaded = 0, 0  # the one being written; the first that is not uploaded yet
        self._data, self._written = bytearray(), 0  # this segment's lines; how many bytes of them are in its file
        self._file: FileIO | None = None
        self._is_said = False  # that it cannot be written
        self._file_lock = threading.Lock()  # guards all of the above
        self._lines: list[bytes] = []  # recorded since the last flush
        self._lines_lock = threading.Lock()  # guards these, and is never held for long
        self._flusher = ThreadPoolExecutor(1, "journal")
        self._flushing: Future[None] | None = None
        self._flushed = time.monotonic()
        self._write({"attempt": attempt, "start_step": start_step})

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records measurements of ``step``, e.g. {"loss": 0.91}. Characters of names as in MLflow: [A-Za-z0-9_./ -]."""
        numbers = {name: float(value) for name, value in values.items()}
        self._write({"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": numbers})

    def picture(self, step: int, path: str) -> None:
        """Records the ``path``, relative to the run folder, of a picture file that is complete on disk."""
        assert not os.path.isabs(path), f"{path} must be relative to the run folder"
        self._write({"step": step, "time_ms": time.time_ns() // 1_000_000, "picture": path})

    def seal(self) -> None:
        """Makes all records so far durable and begins the next segment. Call before each COMMIT and at the end.

        Waits for a disk in trouble, as all writes into a run do. Raises StorageDown, UserError or FileNotFoundError,
        and the errors of ``upload``. Nothing is lost then: the next call does the rest.
        """
        with self._file_lock:
            with_local(str(self._path(self._segment)), self._finish_segment, writing=True)
            while self._uploaded < self._segment:
                self._upload(self._path(self._uploaded))
                self._uploaded += 1

    def _finish_segment(self) -> None:
        with self._rewriting_after_errors():
            self._flush()
            if self._file is not None:
                os.fsync(self._file.fileno())
                self._file.close()
                fsync_folder(self._folder)
        if self._file is not None:
            self._file, self._written = None, 0
            self._data.clear()
            self._segment += 1

    def _path(self, segment: int) -> Path:
        return self._folder / f"{segment:05d}.jsonl"

    def _write(self, record: dict[str, Any]) -> None:
        line = _encode(record).encode() + b"\n"
        with self._lines_lock:
            self._lines.append(line)
        if (moment := time.monotonic()) - self._flushed >= _FLUSH_EVERY_S:
            self._flushed = moment
            if self._flushing is None or self._flushing.done():  # else the disk hangs, and one waiting thread is enough
                self._flushing = self._flusher.submit(self._flush_in_background)

    def _flush_in_background(self) -> None:
        with self._file_lock:
            try:
                with self._rewriting_after_errors():
                    self._flush()
                self._is_said = False
            except OSError as error:
                if not self._is_said:
                    log.warning("the journal cannot be written yet; training continues: %s", error)
                self._is_said = True

    @contextmanager
    def _rewriting_after_errors(self) -> Generator[None]:
        try:
            yield
        except OSError:
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            self._file, self._written = None, 0
            raise

    def _flush(self) -> None:
        with self._lines_lock:
            lines, self._lines = self._lines, []
        self._data += b"".join(lines)
        if self._written == len(self._data):
            return
        if self._file is None:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
                fsync_folder(self._folder.parent)
            self._file = _open(self._path(self._segment))
        while self._written < len(self._data):
            self._written += self._file.write(self._data[self._written :])


def _open(path: Path) -> FileIO:
    """A segment, to be written from its beginning. What it holds after an error is the beginning of what it will."""
    try:
        return open(path, "xb", buffering=0)
    except FileExistsError:
        return open(path, "r+b", buffering=0)


class PositionShape(Shape):
    """A ``Position`` as a record has it."""

    attempt: Count
    segment: Count
    offset: Count


@dataclass(frozen=True, order=True)
class Position:
    """A position in a run's journals: ``offset`` bytes into one segment. Everything before it has been read."""

    attempt: int = 0
    segment: int = 0
    offset: int = 0

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Position":
        """That of a record of ``PositionShape``."""
        return cls(*(record[name] for name in PositionShape.model_fields))


@dataclass(frozen=True)
class Record:
    """One line of a journal; ``metrics`` or ``picture`` is None. ``end`` is the position just after it."""

    step: int
    time_ms: int
    metrics: dict[str, float] | None
    picture: str | None
    end: Position


@dataclass(frozen=True)
class Span:
    """The steps ``low < step <= high`` that ``attempt`` contributes. ``growing``: a later COMMIT may extend it."""

    attempt: int
    low: int
    high: int
    growing: bool


def spans(entries: Sequence[LogEntry]) -> list[Span]:
    """The steps that each attempt contributes, from the log's entries; in the order of the claims, without overlap."""
    claims = [e.attempt for e in entries if e.kind == "CLAIM"]
    found, low = [], -1  # -1, since records of step 0 count
    for attempt in claims:
        steps = [e.fields["step"] for e in entries if e.kind == "COMMIT" and e.attempt == attempt]
        high = max(steps, default=-1)
        if high > low:
            found.append(Span(attempt, low, high, growing=attempt == claims[-1]))
            low = high
    return found


def read(run: Run, after: Position = Position()) -> Iterator[Record]:
    """The current canonical curve of ``run``, from ``after`` on.

    A later call, after more COMMITs, only continues the curve: pass ``Record.end`` of the last record as ``after``. A
    torn line, left by a killed process, and everything behind it in its segment are not read.
    """
    for span in spans(run.log.entries()):
        if span.attempt < after.attempt:
            continue
        start = after if span.attempt == after.attempt else Position(span.attempt)
        for record in read_attempt(run, start):
            if record.step > span.high and span.growing:
                return  # a later COMMIT may cover this line: the next call must begin at or before it
            if span.low < record.step <= span.high:
                yield record


def read_attempt(run: Run, start: Position) -> Iterator[Record]:
    """Every complete record of one attempt from ``start`` on, committed or not.

    Of a run on another storage: the segments that were uploaded, and on the node that writes them also the others.
    """
    for segment in count(start.segment):
        offset = start.offset if segment == start.segment else 0
        try:
            data = _segment(run, f"attempts/{start.attempt}/journal/{segment:05d}.jsonl", offset)
        except FileNotFoundError:
            return
        for line in data.splitlines(keepends=True):
            offset += len(line)
            if (record := _parse(line)) is None:
                break
            if "step" in record:
                position = Position(start.attempt, segment, offset)
                yield Record(record["step"], record["time_ms"], record.get("metrics"), record.get("picture"), position)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole line's record; None if it is torn, or no line of a journal."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not {"attempt", "step"} & record.keys():
        return None
    return record if "step" not in record or _is_measured(record) else None


def _is_measured(record: dict[str, Any]) -> bool:
    """Whether a step's record holds what ``Journal`` writes."""
    metrics, picture = record.get("metrics", {}), record.get("picture", "")
    return (
        all(type(record.get(key)) is int and -_BIG < record[key] < _BIG for key in ("step", "time_ms"))
        and type(metrics) is dict
        and all(type(value) is float or (type(value) is int and -_BIG < value < _BIG) for value in metrics.values())
        and type(picture) is str
        and not (picture.startswith("/") or ".." in picture.split("/"))
    )


def _segment(run: Run, path: str, offset: int) -> bytes:
    """A segment's bytes from ``offset`` on. The writing node's copy is never shorter than the uploaded one."""
    file = run.local_path(path)
    try:
        return with_local(str(file), lambda: _read_from(file, offset))
    except FileNotFoundError:
        return run.store.read(path)[offset:]


def _read_from(file: Path, offset: int) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(offset)
        return opened.read()
