"""Writing one shard: items to samples to one file, and its record in ``parts/``, from which ``build.py`` continues."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from data_sharding.format.manifest import FILE
from data_sharding.format.shard import Sample, ShardBuilder
from data_sharding.storage.files import exists, put
from data_sharding.storage.json_bytes import to_json
from data_sharding.worker_pool import Progress
from data_sharding.write.findings import Skipped

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
    digest of what the dataset is written from and how; all its shards must have been written with the same."""

    root: str
    dataset: str
    name: str
    items: tuple[ItemT, ...]
    classes: tuple[str, ...]
    make: Maker[ItemT]
    options: str

    @property
    def part(self) -> str:
        """URL of the record."""
        return f"{self.dataset}/parts/{self.name}.json"


def write_shard(task: ShardTask, progress: Progress) -> None:
    """Writes one shard and then its record; stops if another task has written the record."""
    builder, skipped, several = ShardBuilder(task.name), [], 0
    for at in range(0, len(task.items), _CHUNK):
        if exists(task.part) or exists(f"{task.root}/{FILE}"):
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
    if index.samples:
        put(f"{task.dataset}/{task.name}", data)
    if not exists(f"{task.root}/{FILE}"):
        put(task.part, record)
