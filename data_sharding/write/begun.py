"""What all tasks that write one dataset must have in common, or it would be a mixture.

The first of them records it, by a conditional create, so that of tasks that start at the same time all compare theirs
with one record:

    DST/parts/options.json     ``Options``: what the dataset is written from, and how
    DST/parts/software.json    {"code": "9a31…", "numpy": "2.4.1", "pillow": "12.0.0", …}: what makes bytes of it
"""

from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

from data_sharding.errors import UserError
from data_sharding.format.class_names import class_digest
from data_sharding.format.manifest import FILE, Header, Manifest
from data_sharding.storage.file_digest import code_digest
from data_sharding.storage.files import create_once, exists, read
from data_sharding.storage.json_bytes import from_json, to_json
from data_sharding.storage.records import Count, Shape
from data_sharding.write.cleanup import holds_shards, remove, remove_unfinished
from data_sharding.write.views import square_side

_PACKAGES = ("numpy", "pillow", "safetensors", "zstandard")  # beside our own code, what decides the bytes of a shard
_VAE_PACKAGES = ("torch", "diffusers")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """Everything that determines a dataset's bytes. ``source``, ``codec`` and ``classes`` (that of the class list) are
    digests, ``holdout`` a fraction."""

    source: str
    codec: str
    max_tokens: int
    images_per_shard: int
    holdout: float
    classes: str

    def __post_init__(self):
        square_side(self.max_tokens)
        if not 0 <= self.holdout < 1:
            raise UserError(
                f"holdout is the fraction of images to set aside: at least 0 and below 1, not {self.holdout}"
            )
        if self.images_per_shard < 1:
            raise UserError(f"images_per_shard must be at least 1, not {self.images_per_shard}")

    @property
    def digest(self) -> str:
        """Of all of them."""
        return _digest(asdict(self))

    @property
    def digests(self) -> set[str]:
        """``digest``, and what earlier versions recorded, which did not count the classes."""
        former = asdict(self)
        del former["classes"]
        return {self.digest, _digest(former)}

    @classmethod
    def of(cls, header: Header) -> "Options":
        """The options that a finished dataset was written with."""
        source, codec, classes = header.source, header.codec["digest"], class_digest(header.classes)
        return cls(source["digest"], codec, header.max_tokens, source["images_per_shard"], source["holdout"], classes)


class _Options(Shape):
    """options.json. Earlier versions did not write ``classes``."""

    source: str
    codec: str
    max_tokens: Count
    images_per_shard: Count
    holdout: float
    classes: str = ""


def is_finished(dst: str, options: Options) -> bool:
    """Whether the dataset is complete. Raises UserError if it exists, in whole or part, with other options."""
    record = options_file(dst)
    if exists(f"{dst}/{FILE}"):
        begun = asdict(Options.of(Manifest.load(dst).header))
        _refuse(dst, begun, options, "or give another folder")
        return True
    if exists(record):
        _is_as_begun(dst, from_json(read(record), record, _Options, _again(dst)), options)
    return False


def begin(dst: str, options: Options, vae: bool) -> bytes:
    """Records what ``dst`` is written from, or compares it with what is recorded; ``vae``: its codec is one. Returns
    the content of ``options_file``: as long as it stays the same, the tasks agree.

    Raises UserError if other tasks have other options, or another version of the program.
    """
    record, data = options_file(dst), to_json(asdict(options))
    if not exists(record) and holds_shards(dst) and not _is_begun(dst):
        raise UserError(f"{dst} holds shards, but no record of what they were written from: remove it (rm -r {dst})")
    there = create_once(record, data)
    remove_unfinished(dst)  # of a writer that was killed
    if there != data and not _is_as_begun(dst, from_json(there, record, _Options, _again(dst)), options):
        remove(record, "rm_file")
        if (there := create_once(record, data)) != data:
            raise UserError(f"another task is starting {dst} with other options: give all tasks the same")
    _agree_on_software(dst, vae)
    return there


def options_file(dst: str) -> str:
    """URL of the record of the options of the unfinished dataset at ``dst``."""
    return f"{dst}/parts/options.json"


def _again(dst: str) -> str:
    return f"remove the unfinished dataset (rm -r {dst}) and write it again"


def _is_begun(dst: str) -> bool:
    """Whether another task has begun the dataset at ``dst``, or finished it."""
    return exists(options_file(dst)) or exists(f"{dst}/{FILE}")


def _is_as_begun(dst: str, begun: dict[str, Any], options: Options) -> bool:
    """Whether ``options`` are those of the unfinished dataset. Raises UserError if they are not, and some of it is
    written; if nothing is, it may as well start with them."""
    if all(begun.get(name, value) == value for name, value in asdict(options).items()):
        return True
    if holds_shards(dst):
        _refuse(dst, begun, options, f"or remove it (rm -r {dst}), or give another folder")
    return False


def _refuse(dst: str, begun: dict[str, Any], options: Options, remedy: str) -> None:
    """Raises UserError if an option is another one than that in ``begun``."""
    for name, now in asdict(options).items():
        if (before := begun.get(name, now)) != now:
            raise UserError(
                f"{dst} was started with another {name} ({before}, now {now}): give the same options and source as "
                f"before (with images added, removed or changed it is another one), {remedy}"
            )


def _agree_on_software(dst: str, vae: bool) -> None:
    record = f"{dst}/parts/software.json"
    mine = {"code": code_digest(_ROOT, ("data_sharding/format", "data_sharding/write"))}
    mine |= {name: _version(name) for name in (*_PACKAGES, *(_VAE_PACKAGES if vae else ()))}
    begun = from_json(create_once(record, to_json(mine)), record, Shape, "remove it, and start again")
    if changes := [f"{name} is {version} here and was {begun.get(name)}" for name, version in mine.items()
                   if begun.get(name) != version]:  # fmt: skip
        raise UserError(
            f"{dst} was started by another version of the program ({', '.join(changes)}), which may write other bytes: "
            f"start all tasks with the same one; if no other task is writing, remove {record}, and this one continues"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _digest(options: dict[str, Any]) -> str:
    return blake2b(to_json(options | {"holdout": float(options["holdout"])}), digest_size=16).hexdigest()
