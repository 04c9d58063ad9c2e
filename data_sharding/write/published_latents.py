"""Finds and lists latents in the layout in which FiT's were published (whlzy/FiT, in1k_latent_dataset.py).

    SRC/from_16_to_256/          one .safetensors per image: the resize view of images of at most 256 tokens
    SRC/greater_than_256_resize/ the resize view of larger images
    SRC/greater_than_256_crop/   their crop view, under the same file names, if they have one

Each may also be a ``.tar`` or ``.tar.gz``, or one that is split into parts (``.tar.gz.part_aa``, …). ``less_than_16``
belongs to no training set and is ignored, as in the released code.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from data_sharding.errors import UserError
from data_sharding.storage.byte_ranges import ByteRange
from data_sharding.storage.files import fs_call
from data_sharding.storage.filesystems import file_system
from data_sharding.storage.tar_members import is_tar_name, list_tar
from data_sharding.write.entries import refuse_collisions, sample_id
from data_sharding.write.findings import Findings, is_utf8, printable, suffix_of
from data_sharding.write.source_files import Top, list_folder, list_top

_NAME = re.compile(
    r"(from_16_to|greater_than)_(\d+)(_resize|_crop)?"
    r"(?i:(\.tar\.gz|\.tgz|\.tar))?(?:[._-](?:part[._-]?)?([a-z]{2,3}|\d+))?"
)

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class LatentFiles:
    """The files of one image: byte ranges of its views, "resize" first. ``key`` is the file's name in its folder."""

    id: int
    key: str
    views: tuple[tuple[str, ByteRange], ...]


@dataclass(frozen=True)
class LatentGroup:
    """One of the three. ``files`` holds (URL, bytes) of a folder's files, of a tar, or of the parts in order."""

    name: str
    view: str
    folder: str
    files: tuple[tuple[str, int], ...]

    @property
    def is_tar(self) -> bool:
        """Whether it is a tar that can be read in place."""
        return len(self.files) == 1 and is_tar_name(self.files[0][0])


@dataclass(frozen=True)
class PublishedLatents:
    """``groups`` in the order above. ``digest`` covers the names and sizes of all files. ``findings``: what the folders
    hold besides."""

    max_tokens: int
    groups: tuple[LatentGroup, ...]
    digest: str
    findings: Findings


def open_published(src: str, max_tokens: int | None) -> PublishedLatents:
    """Finds the three groups. Raises UserError if one, or a part of one, is missing, or if there are several sets."""
    findings = Findings()
    fs, root = file_system(src)
    top = list_top(src)
    found: dict[int, dict[str, list[tuple[str, str]]]] = {}
    for name in sorted([*top.files, *top.folders]):
        match = _NAME.fullmatch(name)
        if match and (match[1] == "greater_than") == bool(match[3]):
            if reason := top.files.get(name):
                raise UserError(f"{src}/{name} cannot be read: {reason}")
            group = f"{match[1]}_{match[2]}{match[3] or ''}"
            found.setdefault(int(match[2]), {}).setdefault(group, []).append((match[5] or "", name))
        elif name in top.files:
            findings.file(name)
            findings.aside(suffix_of(name))
        else:
            findings.aside(f"folder {printable(name)}")
    for name in top.left_aside:
        findings.aside(f"folder {printable(name)}")
    limit = _limit(src, set(found), max_tokens)
    views = {f"from_16_to_{limit}": "resize", f"greater_than_{limit}_resize": "resize"}
    views[f"greater_than_{limit}_crop"] = "crop"
    groups = []
    for name, view in views.items():
        if name not in found[limit]:
            raise UserError(f"{src} lacks {name} (a folder, .tar, .tar.gz or its parts): all three groups are needed")
        groups.append(_group(src, name, view, sorted(found[limit][name]), top, findings))
    prefix = len(fs.unstrip_protocol(root.rstrip("/"))) + 1
    lines = "".join(f"{url[prefix:]}\t{size}\n" for group in groups for url, size in group.files)
    return PublishedLatents(limit, tuple(groups), blake2b(lines.encode(), digest_size=16).hexdigest(), findings)


def _group(src: str, name: str, view: str, items: list[tuple[str, str]], top: Top, findings: Findings) -> LatentGroup:
    """``items``: (part, name in ``src``), in order."""
    fs, root = file_system(src)
    here = fs.unstrip_protocol(root.rstrip("/"))
    if not any(item in top.folders for _, item in items):
        _refuse_gaps(src, name, [part for part, _ in items])
        urls = [f"{here}/{item}" for _, item in items]
        return LatentGroup(name, view, "", tuple((url, fs_call(url, "size")) for url in urls))
    if len(items) > 1:
        raise UserError(f"{src} holds {name} both as a folder and as an archive: move one of them away")
    inside = Findings()
    listing = list_folder(f"{here}/{items[0][1]}", (_SUFFIX,), inside)
    findings.add(inside)
    urls = tuple((data.url, data.size) for _, data in sorted(listing.files.items()))
    return LatentGroup(name, view, f"{here}/{items[0][1]}", urls)


def list_latent_files(groups: list[tuple[LatentGroup, str | None]], findings: Findings) -> list[LatentFiles]:
    """The images of all groups, their views joined by file name; with each archive comes the tar to read instead.
    ``findings`` receives what the archives hold besides.

    Raises:
        UserError: a tar is damaged, an image occurs twice, or there is none.
    """
    views: dict[str, list[tuple[str, ByteRange]]] = {}
    for group, tar in groups:
        for key, data in _files(group, tar, findings):
            known = views.setdefault(key, [])
            if group.view in (view for view, _ in known):
                raise UserError(f"the {group.view} view of {key} occurs twice, again in {group.name}: remove one")
            known.append((group.view, data))
    if not views:
        raise UserError("these folders hold no .safetensors file")
    entries = [LatentFiles(sample_id(key), key, tuple(found)) for key, found in sorted(views.items())]
    refuse_collisions(entries)
    return entries


def _files(group: LatentGroup, tar: str | None, findings: Findings) -> Iterator[tuple[str, ByteRange]]:
    if tar is None:
        for url, size in group.files:
            yield url[len(group.folder) + 1 :], ByteRange(url, None, size)
        return

    def unusable(name: str, reason: str) -> None:
        findings.file(name)
        if name.lower().endswith(_SUFFIX):
            findings.leave_out(name, reason)
        else:
            findings.aside(suffix_of(name))

    for name, data in list_tar(tar, unusable=unusable):
        if not name.endswith(_SUFFIX):
            unusable(name, "")
        elif not is_utf8(name):
            unusable(name, "the name is not UTF-8: rename the file")
        else:
            findings.file(name)
            before, inside, after = f"/{name}".rpartition(f"/{group.name}/")
            yield after if inside else name, data


def _limit(src: str, limits: set[int], wanted: int | None) -> int:
    if wanted is None and len(limits) == 1:
        return limits.pop()
    if wanted in limits:
        return wanted
    if not limits:
        raise UserError(
            f"{src} holds none of the published folders: from_16_to_256, greater_than_256_resize and …_crop"
        )
    there = ", ".join(map(str, sorted(limits)))
    raise UserError(f"{src} holds latents of at most {there} tokens: give one of these numbers as --max-tokens")


def _refuse_gaps(src: str, name: str, parts: list[str]) -> None:
    """Parts are numbered aa, ab, … az, ba or 00, 01, …; if the last one is missing, the archive ends too early."""
    if parts == [""]:
        return
    numbers = [_number(part) for part in parts]
    first = 1 if parts[0].isdecimal() and numbers[0] == 1 else 0
    for expected, number, part in zip(range(first, first + len(parts)), numbers, parts, strict=True):
        if number != expected:
            raise UserError(f"{src}: a part of {name} before {part or 'the whole'} is missing, or one is there twice")


def _number(part: str) -> int:
    if part.isdecimal():
        return int(part)
    number = 0
    for letter in part:
        number = number * 26 + ord(letter) - ord("a")
    return number
