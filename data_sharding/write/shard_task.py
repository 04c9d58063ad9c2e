"""Writing one shard: items to samples to one file, and its record in ``parts/``, from which ``build.py`` continues.

Two tasks may write the same shard, and not make the same bytes of it: the libraries compute otherwise on another
processor. So file and record are each created at most once, and whoever finds a file of other bytes leaves the record
to its writer: a record always describes the file beside it.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Generic, NamedTuple, Protocol, TypeVar

from pydantic import Field

from data_sharding.errors import UserError
from data_sharding.format.manifest import FILE
from data_sharding.format.shard import Sample, ShardBuilder
from data_sharding.storage.files import create_once, exists, put, read
from data_sharding.storage.json_bytes import to_json
from data_sharding.storage.records import Count, Shape
from data_sharding.worker_pool import Progress
from data_sharding.write.begun import options_file
from data_sharding.write.findings import Skipped
from data_sharding.write.write_report import LeftOut

_PATIENCE, _POLL = 30.0, 0.5  # seconds for which a file of another task may wait for its record; and between two looks
_CHUNK = 64  # items per call of the maker: enough pictures of one size for a batch, few enough for the memory


class Item(Protocol):
    """The source of one sample. Items are picklable and small."""

    @property
    def id(self) -> int: ...

    @property
    def key(self) -> str: ...


ItemT = TypeVar("ItemT", bound=Item)


class Made(NamedTuple):
    """``source`` is the item's key, ``pixels`` the (height, width) of its image, None if unknown;
    ``first_of_several``: its file holds further frames, which are not written."""

    sample: Sample
    source: str
    pixels: tuple[int, int] | None
    first_of_several: bool = False


Maker = Callable[[tuple[ItemT, ...]], Iterable[Made | Skipped]]  # picklable; one result per item, in order


@dataclass(frozen=True)
class ShardTask(Generic[ItemT]):
    """One shard of the dataset at ``dataset``, which is ``root`` or its holdout, for one process to write. ``options``:
    digest of what the dataset is written from and how; all its shards must have been written with the same. ``begun``:
    the content of ``begun.options_file``."""

    root: str
    dataset: str
    name: str
    items: tuple[ItemT, ...]
    classes: tuple[str, ...]
    make: Maker[ItemT]
    options: str
    begun: bytes

    @property
    def part(self) -> str:
        """URL of the record."""
        return f"{self.dataset}/parts/{self.name}.json"


# JSON has lists, no tuples.
_Size = Annotated[tuple[Count, Count], Field(strict=False)]
_Sizes = Annotated[tuple[_Size, _Size], Field(strict=False)]
_Frame = Annotated[tuple[Count, Count, Count, str, Count], Field(strict=False)]
_Sample = Annotated[tuple[Count, Count, _Sizes], Field(strict=False)]


class _Index(Shape):
    """As ``ShardIndex``."""

    name: str
    bytes: Count
    xxh3_128: str
    frames: list[_Frame]
    samples: list[_Sample]


class Part(Shape):
    """The record of a shard. Earlier versions did not always write ``several_frames`` and ``options``."""

    index: _Index
    skipped: list[LeftOut]
    several_frames: Count = 0
    options: str = ""


def write_shard(task: ShardTask, progress: Progress) -> None:
    """Writes one shard and then its record; stops if another task has written the record.

    Raises UserError if the tasks do not agree: another one has begun the dataset with other options, or has recorded
    the same shard otherwise.
    """
    builder, skipped, several = ShardBuilder(task.name), [], 0
    _require_begun(task)
    for at in range(0, len(task.items), _CHUNK):
        if _is_done(task):
            progress(len(task.items) - at, False)
            return
        chunk = task.items[at : at + _CHUNK]
        for made in task.make(chunk):
            if isinstance(made, Skipped):
                skipped.append(made._asdict())
            else:
                several += made.first_of_several
                class_name = task.classes[made.sample.label]
                builder.add(made.sample, class_name=class_name, source=made.source, pixels=made.pixels)
        progress(len(chunk), True)
    data, index = builder.finish()
    counts = {"skipped": skipped, "several_frames": several, "options": task.options}
    record = to_json({"index": index.to_record()} | counts)
    _require_begun(task)
    if index.samples and not _is_ours(task, data):
        return
    if not exists(f"{task.root}/{FILE}") and create_once(task.part, record) != record:
        raise UserError(
            f"two tasks have written {task.dataset}/{task.name}, and differ in what they left out of it: start all "
            f"tasks alike; remove {task.root} (rm -r {task.root}) and write it again"
        )


def _is_done(task: ShardTask) -> bool:
    return exists(task.part) or exists(f"{task.root}/{FILE}")


def _require_begun(task: ShardTask) -> None:
    record = options_file(task.root)
    try:
        there = read(record)
    except FileNotFoundError:
        if exists(f"{task.root}/{FILE}"):  # another task has finished the dataset
            return
        raise UserError(f"{task.root} was removed while it was written ({record} is missing): start again") from None
    if there != task.begun:
        raise UserError(f"another task has started {task.root} with other options: give all tasks the same")


def _is_ours(task: ShardTask, data: bytes) -> bool:
    """Writes the file of the shard, unless there is one. Whether ``data`` is what it holds then; else another task has
    recorded what it holds."""
    url = f"{task.dataset}/{task.name}"
    if create_once(url, data) == data:
        return True
    patient_until = time.monotonic() + _PATIENCE
    while not _is_done(task):
        if time.monotonic() > patient_until:  # its writer has died, or it was left from another dataset
            put(url, data)
            return True
        time.sleep(_POLL)
    return False
