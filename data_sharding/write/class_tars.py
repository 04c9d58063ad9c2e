"""Class tars, as ImageNet is distributed: a tar for each class, in a folder or in a tar. Nothing is unpacked."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from data_sharding.errors import UserError
from data_sharding.storage.byte_ranges import ByteRange
from data_sharding.storage.tar_members import Member, first_names, is_tar_name, list_tar
from data_sharding.write.entries import (
    ImageSource,
    image_source,
    listed,
    no_images,
    refuse_class_names,
    refuse_splits,
)
from data_sharding.write.findings import Findings, in_system_folder, is_utf8, suffix_of
from data_sharding.write.image_file import is_image_name
from data_sharding.write.webdataset import list_webdataset, suffixes_beside_images

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_ARCHIVES = (".tar", *_COMPRESSED, ".zip", ".7z", ".rar")
_LISTERS = 16  # tars listed in parallel: the time is spent waiting for the storage


def open_tars(urls: list[str]) -> ImageSource:
    """Lists class tars, a tar of them, or WebDataset tars: the first files of the first tar tell which: in a WebDataset
    about every image has a .cls or .json of its name.

    Raises:
        UserError: a tar is missing or damaged, or the tars are of another kind.
    """
    first = [name.lower() for name in first_names(urls[0], 100)]
    if any(name.endswith((".tar", *_COMPRESSED)) for name in first):
        if len(urls) > 1:
            raise UserError(f"{urls[0]} is a tar of tars, and there are other tars: give this one alone")
        return _tar_of_tars(urls[0])
    labels = {".cls", ".json"} & suffixes_beside_images(first)
    if labels or (not any(map(is_image_name, first)) and any(name.endswith(".cls") for name in first)):
        return list_webdataset(urls, [_stem(url) for url in urls], _in_parallel)
    if len(urls) == 1 and first and all("/" in name for name in first):
        raise UserError(f"{urls[0]} holds folders of images: unpack it and give the folder")
    return _class_tars([(_stem(url), url, 0) for url in urls], urls[0], Findings())


def is_archive_name(name: str) -> bool:
    """Whether a file of this name is taken for an archive, of which only tars can be read in place."""
    return name.lower().endswith(_ARCHIVES)


def refuse_compressed(src: str, names: list[str]) -> None:
    """Raises UserError if there are compressed archives beside the tars in ``src``: their classes would be missing."""
    if found := [name for name in names if is_archive_name(name) and not is_tar_name(name)]:
        raise UserError(
            f"{src} holds compressed archives beside tars ({listed(found)}): make plain tars of them first, or move "
            "them away"
        )


def _tar_of_tars(url: str) -> ImageSource:
    findings = Findings()
    inner = []

    def unusable(name: str, reason: str) -> None:
        findings.file(name)
        if is_tar_name(name):
            raise UserError(f"{url}: {name} cannot be read ({reason}), and its class would be missing")
        findings.unusable(name, reason)

    members = list(list_tar(url, unusable=unusable))
    refuse_compressed(url, [member.name for member in members])
    for member in members:
        if is_tar_name(member.name):
            inner.append((_stem(member.name), member.data.url, member.data.start or 0))
        else:
            findings.file(member.name)
            findings.unusable(member.name, "it lies beside the class tars and belongs to no class")
    return _class_tars(inner, url, findings)


def _class_tars(tars: list[tuple[str, str, int]], src: str, findings: Findings) -> ImageSource:
    """``tars``: (class, URL, first byte) of each."""
    names = sorted(name for name, _, _ in tars)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{src}: there are several tars of the class {listed(twice)}: put their images into one")
    refuse_class_names(src, names)
    images: dict[str, tuple[str, ByteRange]] = {}
    empty = set(names)
    for (name, url, _), (found, beside, more) in zip(tars, _in_parallel(_members, tars), strict=True):
        findings.add(more)
        _refuse_labels(f"{url}: {name}.tar", beside, more)
        images |= {f"{name}/{member.name}": (name, member.data) for member in found}
        if found or more.left_out:
            empty.discard(name)
    if not images:
        raise no_images(f"{src} holds", findings)
    nested = all("/" in key.partition("/")[2] for key in images)
    refuse_splits(src, set(names) - empty, nested, "unpack one part and give its folder")
    _refuse_class_folders(src, images)
    return image_source(names, images, findings, empty)


def _refuse_class_folders(src: str, keys: Iterable[str]) -> None:
    """Raises UserError if the folders in the tars are the classes, not the tars: if one that has no image outside of
    them holds several, or several hold the same one among others. A folder that is named as its tar is no class."""
    folders: dict[str, set[str]] = {}
    for key in keys:
        tar, *inner = key.split("/")[:-1]
        folders.setdefault(tar, set()).add("" if tar in inner else "/".join(inner))
    nested = {tar: found for tar, found in folders.items() if "" not in found}
    times = Counter(folder for found in nested.values() for folder in found)
    if any(len(found) > 1 for found in nested.values()) or (len(times) > 1 and max(times.values()) > 1):
        tar = max(nested, key=lambda tar: len(nested[tar]))
        raise UserError(
            f"{src}: {tar}.tar holds folders of images ({listed(sorted(nested[tar]))}): unpack it and give the folder; "
            "of several tars, unpack all into one folder"
        )


def _refuse_labels(where: str, beside: set[str], findings: Findings) -> None:
    """Raises UserError if the tar seems to hold the labels of its images. ``beside``: see `suffixes_beside_images`."""
    if findings.seen[".cls"]:
        raise UserError(
            f"{where} holds labels (.cls), but not beside its images: write the tar again as a WebDataset, each image "
            "followed by its label"
        )
    if beside:
        raise UserError(
            f"{where} holds a {listed(sorted(beside))} for each image, which may be its label; labels are read from a "
            '.cls, or "label" in a .json, that lies next to its image: write the tars again so, or, if each is one '
            "class, unpack them into one folder per class"
        )


def _members(tar: tuple[str, str, int]) -> tuple[list[Member], set[str], Findings]:
    """The images of a class tar, and `suffixes_beside_images`. Of files of one name the last counts, as when the tar is
    unpacked."""
    name, url, start = tar
    findings = Findings()
    found: dict[str, Member] = {}
    names = []

    def unusable(member: str, reason: str) -> None:
        findings.file(member)
        findings.unusable(f"{name}/{member}", reason)

    for member in list_tar(url, start, unusable):
        findings.file(member.name)
        if in_system_folder(member.name, findings):
            continue
        names.append(member.name)
        if not is_image_name(member.name):
            findings.aside(suffix_of(member.name))
        elif not is_utf8(member.name):
            findings.leave_out(f"{name}/{member.name}", "the name is not UTF-8: rename the file")
        else:
            if member.name in found:
                findings.aside("replaced by a later file of the same name")
            found[member.name] = member
    return list(found.values()), suffixes_beside_images(names), findings


def _stem(name: str) -> str:
    name = name.rpartition("/")[2]
    return name[: -len(".tar")] if is_tar_name(name) else name


def _in_parallel(work: Callable, items: list) -> Iterator:
    with ThreadPoolExecutor(_LISTERS) as pool:
        yield from pool.map(work, items)
