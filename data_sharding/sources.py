"""Where images come from: today a folder with one folder for each class.

    SRC/cat/0007.jpg    key "cat/0007.jpg", class "cat"
    SRC/cat/kittens/a.png    key "cat/kittens/a.png", class "cat"
    SRC/dog/0001.jpg    key "dog/0001.jpg", class "dog"

A class's label is the place of its folder's name in sorted order, folders without images included (sorted WNIDs are
ImageNet's labels). Files that are not named like an image are left aside, as are files directly in SRC.
"""

from dataclasses import dataclass
from hashlib import blake2b

import fsspec

from data_sharding.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass(frozen=True)
class Entry:
    """One image file. ``id`` depends on ``key`` alone, so it survives another sharding or place of the source."""

    id: int
    key: str
    label: int
    url: str


@dataclass(frozen=True)
class Source:
    """``entries`` in order of key. ``digest`` covers every key and file size."""

    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    digest: str


def sample_id(key: str) -> int:
    """The 63-bit id of an image (63, because ids also live in int64)."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def open_folder(src: str) -> Source:
    """Lists a class-folder tree.

    Raises:
        UserError: the folder is missing, empty, without class folders or without images, or two keys share an id.
    """
    fs, root = fsspec.core.url_to_fs(src)
    root = root.rstrip("/")
    if not fs.isdir(root):
        raise UserError(f"{src} is not a folder: give the folder that holds one folder of images for each class")
    top = fs.ls(root, detail=True)
    if not top:
        raise UserError(f"{src} is empty: put the images in it, one folder for each class")
    names = (item["name"].rstrip("/").rpartition("/")[2] for item in top if item["type"] == "directory")
    classes = tuple(sorted(name for name in names if not name.startswith(".")))
    if not classes:
        raise UserError(f"{src} holds no class folders: move its images into one folder for each class")
    sizes = {
        path[len(root) + 1 :]: info["size"]
        for path, info in fs.find(root, detail=True).items()
        if path.lower().endswith(IMAGE_SUFFIXES)
    }
    keys = sorted(key for key in sizes if key.partition("/")[0] in classes and "/" in key)
    if not keys:
        raise UserError(
            f"the class folders in {src} hold no images: files named {', '.join(IMAGE_SUFFIXES)} are looked for"
        )
    labels = {name: label for label, name in enumerate(classes)}
    prefix = fs.unstrip_protocol(root)
    entries = tuple(Entry(sample_id(k), k, labels[k.partition("/")[0]], f"{prefix}/{k}") for k in keys)
    _refuse_collisions(entries)
    lines = "".join(f"{key}\t{sizes[key]}\n" for key in keys)
    return Source(classes, entries, blake2b("\n".join([*classes, "", lines]).encode(), digest_size=16).hexdigest())


def _refuse_collisions(entries: tuple[Entry, ...]) -> None:
    seen: dict[int, str] = {}
    for entry in entries:
        if (other := seen.setdefault(entry.id, entry.key)) != entry.key:
            raise UserError(f"{other} and {entry.key} have the same id by chance: rename one of them")
