"""The images of a source with ids and labels, and what in the names of classes is refused."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from data_sharding.errors import UserError
from data_sharding.storage.byte_ranges import ByteRange
from data_sharding.write.findings import Findings, is_utf8, printable
from data_sharding.write.image_file import IMAGE_SUFFIXES

_SPLITS = {
    "train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation", "holdout",
}  # fmt: skip
_NAMED = 3  # names in a sentence


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image file. ``id`` depends on ``key`` only, so it survives another sharding or location of the source."""

    id: int
    key: str
    label: int
    data: ByteRange


@dataclass(frozen=True)
class ImageSource:
    """``entries`` in order of key. ``digest`` covers every class, key, label and file size. ``empty``: the folders or
    tars of classes in which there is no image, not even one that was left out."""

    classes: tuple[str, ...]
    entries: tuple[ImageFile, ...]
    digest: str
    findings: Findings
    empty: tuple[str, ...] = ()


def sample_id(key: str) -> int:
    """The 63-bit id of an image (63, because ids also live in int64)."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def image_source(
    classes: list[str], images: dict[str, tuple[str, ByteRange]], findings: Findings, empty: Iterable[str] = ()
) -> ImageSource:
    """``images``: {key: (class, byte range)}. Raises UserError if two ids are the same."""
    labels = {name: label for label, name in enumerate(classes)}
    keys = sorted(images)
    entries = tuple(ImageFile(sample_id(key), key, labels[images[key][0]], images[key][1]) for key in keys)
    refuse_collisions(entries)
    lines = "".join(
        f"{entry.key}\t{entry.data.size}\n"
        if images[entry.key][0] == entry.key.partition("/")[0]
        else f"{entry.key}\t{entry.data.size}\t{entry.label}\n"
        for entry in entries
    )
    digest = blake2b("\n".join([*classes, "", lines]).encode(), digest_size=16)
    return ImageSource(tuple(classes), entries, digest.hexdigest(), findings, tuple(sorted(empty)))


def refuse_collisions(entries) -> None:
    """Raises UserError if two entries have one id."""
    seen: dict[int, str] = {}
    for entry in entries:
        if (other := seen.setdefault(entry.id, entry.key)) != entry.key:
            raise UserError(f"{other} and {entry.key} have the same id by chance: rename one of them")


def no_images(where: str, findings: Findings) -> UserError:
    """The error that there are none, or none that can be read."""
    if findings.left_out:
        source, reason = findings.left_out[0]
        return UserError(
            f"{where} no images that can be read: {len(findings.left_out)} are left out, for example {source} "
            f"({reason})"
        )
    return UserError(f"{where} no images (files that end in {', '.join(IMAGE_SUFFIXES)})")


def refuse_class_names(src: str, names: Iterable[str]) -> None:
    """Raises UserError if a name cannot be stored, or if two look the same."""
    seen: dict[str, str] = {}
    for name in names:
        if not is_utf8(name):
            raise UserError(f"the class {printable(name)} in {src} has a name that is not UTF-8: rename it")
        if (other := seen.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise UserError(
                f"{src} has two classes of the same name {printable(name)}, written with different Unicode characters "
                f"({other.encode()!r} and {name.encode()!r}): rename one, or put their images together"
            )


def refuse_splits(src: str, classes: Iterable[str], nested: bool, below: str) -> None:
    """Raises UserError if ``classes``, those with images, are the parts of a dataset.

    ``nested``: their images lie in folders, which are the classes then; ``below`` says how to give these. A single
    folder "train" with images may be a class: there are such datasets.
    """
    names = sorted(classes)
    if not names or any(name.lower() not in _SPLITS for name in names) or (len(names) == 1 and not nested):
        return
    remedy = below if nested else "put the images of each part into one folder per class, and give one part at a time"
    raise UserError(f"{src} holds {listed(names)}, which are parts of a dataset and not classes: {remedy}")


def listed(names: Iterable[str]) -> str:
    """Some names for a sentence: a, b, c and 12 more."""
    names = [printable(name) for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
