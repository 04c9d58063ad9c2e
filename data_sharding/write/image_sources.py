"""The sources of images. In each, an image's key holds its class and name, and its id depends on the key only.

A folder with one folder per class:

    SRC/cat/0007.jpg    key "cat/0007.jpg", class "cat"
    SRC/cat/kittens/a.png    key "cat/kittens/a.png", class "cat"

A tar of class tars, as ImageNet is distributed (ILSVRC2012_img_train.tar), or a folder with the class tars. Nothing is
unpacked. Keys and labels are the same as those of the class folders:

    SRC: n01440764.tar: n01440764_18.JPEG    key "n01440764/n01440764_18.JPEG", class "n01440764"

WebDataset tars, as a folder or a pattern such as data/train-{0000..0146}.tar; their samples are grouped by the
webdataset library's own rule:

    train-0000.tar: 0007.jpg, 0007.cls    key "train-0000/0007.jpg", label from .cls, or from "label" in .json

A class's label is its index in sorted order, including classes without images (sorted WNIDs are ImageNet's labels); or,
if all WebDataset labels are numbers, that number. Files without an image suffix are ignored.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from types import SimpleNamespace

from data_sharding.errors import UserError
from data_sharding.storage.byte_ranges import ByteRange, Member, list_tar
from data_sharding.storage.files import fs_call
from data_sharding.storage.filesystems import file_system

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
_LISTERS = 16  # tars listed in parallel: the time is spent waiting for the storage


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image file. ``id`` depends on ``key`` only, so it survives another sharding or location of the source."""

    id: int
    key: str
    label: int
    data: ByteRange


@dataclass(frozen=True)
class ImageSource:
    """``entries`` in order of key. ``digest`` covers every class, key, label and file size."""

    classes: tuple[str, ...]
    entries: tuple[ImageFile, ...]
    digest: str


def sample_id(key: str) -> int:
    """The 63-bit id of an image (63, because ids also live in int64)."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def open_source(src: str) -> ImageSource:
    """Lists the images of ``src``, whichever kind of source it is (see the module).

    Raises:
        UserError: there is nothing at ``src``, or another kind of source; or two images have the same id.
    """
    fs, _ = file_system(src)
    if "{" in src:
        return open_tars(_webdataset_library().expand_urls(src))
    if src.endswith(".tar") and _is_file(src):
        return open_tars([src])
    if not fs_call(src, "isdir"):
        raise UserError(f"{src} is not a folder: give a folder with one folder of images per class, or with tars")
    listing = fs_call(src, "ls", detail=True)
    tars = sorted(item["name"] for item in listing if item["type"] == "file" and item["name"].endswith(".tar"))
    if tars and not _folders(listing):
        return open_tars([fs.unstrip_protocol(tar) for tar in tars])
    return open_folder(src)


def open_folder(src: str) -> ImageSource:
    """Lists a class-folder tree. Raises UserError if it is empty, without class folders or without images."""
    fs, root = file_system(src)
    root = root.rstrip("/")
    top = fs_call(src, "ls", detail=True)
    if not top:
        raise UserError(f"{src} is empty: put the images in it, one folder per class")
    classes = _folders(top)
    if not classes:
        raise UserError(f"{src} has no class folders: move its images into one folder per class")
    prefix = fs.unstrip_protocol(root)
    images = {}
    for path, info in fs_call(src, "find", detail=True).items():
        key = path[len(root) + 1 :]
        if _is_image(key) and "/" in key and key.partition("/")[0] in classes:
            images[key] = ByteRange(f"{prefix}/{key}", None, info["size"])
    if not images:
        raise UserError(f"the class folders in {src} hold no images (files that end in {', '.join(IMAGE_SUFFIXES)})")
    return _source(classes, {key: (key.partition("/")[0], data) for key, data in images.items()})


def open_tars(urls: list[str]) -> ImageSource:
    """Lists class tars, a tar of them, or WebDataset tars: the first files of the first tar tell which."""
    first = [member.name.lower() for member in islice(list_tar(urls[0]), 100)]
    if any(name.endswith(".tar") for name in first):
        if len(urls) > 1:
            raise UserError(f"{urls[0]} is a tar of tars, and there are other tars: give this one alone")
        inner = [(_stem(m.name), m.data.url, m.data.start or 0) for m in list_tar(urls[0]) if m.name.endswith(".tar")]
        return _class_tars(inner, urls[0])
    if any(name.endswith((".cls", ".json")) for name in first):
        return _webdataset(urls)
    if len(urls) == 1 and first and all("/" in name for name in first):
        raise UserError(f"{urls[0]} holds folders of images: unpack it and give the folder")
    return _class_tars([(_stem(url), url, 0) for url in urls], urls[0])


def _class_tars(tars: list[tuple[str, str, int]], src: str) -> ImageSource:
    """``tars``: (class, URL, first byte) of each."""
    images = {}
    for (name, _, _), members in zip(tars, _in_parallel(lambda tar: list(list_tar(*tar[1:])), tars), strict=True):
        images |= {f"{name}/{m.name}": (name, m.data) for m in members if _is_image(m.name)}
    if not images:
        raise UserError(f"{src} holds no images (files that end in {', '.join(IMAGE_SUFFIXES)})")
    return _source(sorted({name for name, _, _ in tars}), images)


def _webdataset(urls: list[str]) -> ImageSource:
    samples: dict[str, tuple[str, ByteRange]] = {}
    for url, found in zip(urls, _in_parallel(_webdataset_samples, urls), strict=True):
        for key, label, data in found:
            if key in samples:
                raise UserError(
                    f"{url}: the sample {key} occurs twice: keys must be unique in a tar, and so must the tars' names"
                )
            samples[key] = label, data
    if not samples:
        raise UserError(f"{urls[0]} holds no images (files that end in {', '.join(IMAGE_SUFFIXES)})")
    labels = {label for label, _ in samples.values()}
    if all(label.isascii() and label.isdecimal() for label in labels):
        samples = {key: (str(int(label)), data) for key, (label, data) in samples.items()}
        return _source([str(i) for i in range(max(map(int, labels)) + 1)], samples)
    return _source(sorted(labels), samples)


def _webdataset_samples(url: str) -> list[tuple[str, str, ByteRange]]:
    """(key, label, byte range) of each image of a tar."""
    files = ({"fname": member.name, "data": member, "__url__": url} for member in list_tar(url))
    found = []
    try:
        for sample in _webdataset_library().group_by_keys(files):
            members = [value for value in sample.values() if isinstance(value, Member)]
            images = [m for m in members if _is_image(m.name)]
            if images:
                label = _label(sample, f"{url}: {images[0].name}")
                found.append((f"{_stem(url)}/{images[0].name}", label, images[0].data))
    except ValueError as error:
        raise UserError(f"{url} is not a WebDataset: {error.args[0]}") from error
    return found


def _label(sample: dict, where: str) -> str:
    if "cls" in sample:
        return sample["cls"].data.read().decode("utf-8", "replace").strip()
    try:
        label = json.loads(sample["json"].data.read())["label"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{where} has no label: put it in a .cls beside it, or as "label" in its .json') from error
    return str(label)


def _webdataset_library():
    try:
        from webdataset import shardlists, tariterators
    except ImportError as error:
        raise UserError("WebDataset tars need the package webdataset: pip install 'fitv2-scale[webdataset]'") from error
    return SimpleNamespace(expand_urls=shardlists.expand_urls, group_by_keys=tariterators.group_by_keys)


def _source(classes: list[str], images: dict[str, tuple[str, ByteRange]]) -> ImageSource:
    """``images``: {key: (class, byte range)}."""
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
    return ImageSource(tuple(classes), entries, digest.hexdigest())


def refuse_collisions(entries) -> None:
    """Raises UserError if two entries have one id."""
    seen: dict[int, str] = {}
    for entry in entries:
        if (other := seen.setdefault(entry.id, entry.key)) != entry.key:
            raise UserError(f"{other} and {entry.key} have the same id by chance: rename one of them")


def _is_file(url: str) -> bool:
    try:
        return fs_call(url, "info")["type"] == "file"  # s3fs's isfile returns False after any error
    except (FileNotFoundError, NotADirectoryError):
        return False


def _folders(listing: list[dict]) -> list[str]:
    names = (item["name"].rstrip("/").rpartition("/")[2] for item in listing if item["type"] == "directory")
    return sorted(name for name in names if not name.startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".tar")


def _in_parallel(work: Callable, items: list) -> Iterator:
    with ThreadPoolExecutor(_LISTERS) as pool:
        yield from pool.map(work, items)
