"""What a source holds besides what is written: nothing is left out without being counted, and images not without being
named."""

import os
import re
from collections import Counter
from typing import NamedTuple

from data_sharding.write.image_file import is_image_name

# What file managers, archivers, notebooks and file systems put beside images: copies, thumbnails, waste bins.
_SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "@recycle", "#recycle", "lost+found", "$recycle.bin", "system volume information",
}  # fmt: skip
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_+-]{0,9}|\.(?=\d*[a-z])[a-z0-9]{2,5}")


class Skipped(NamedTuple):
    """An image that is not written. ``reason`` contains no path and no address, so that it is the same every time."""

    source: str
    reason: str


class Findings:
    """Counts and names while a source is listed. Not for several threads: each has its own, and they are added."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()  # files by suffix
        self.left_aside: Counter[str] = Counter()  # of these, files that are no images by their name; and folders
        self.left_out: list[Skipped] = []  # images by their name that cannot be read, and folders

    def file(self, name: str) -> None:
        """Counts a file that is there."""
        self.seen[suffix_of(name)] += 1

    def aside(self, what: str, count: int = 1) -> None:
        """Counts what is no image: a suffix, or a folder."""
        self.left_aside[what] += count

    def unusable(self, name: str, reason: str) -> None:
        """A file without bytes: named if it is an image by its name, else counted."""
        if is_image_name(name):
            self.leave_out(name, reason)
        else:
            self.aside(suffix_of(name))

    def leave_out(self, name: str, reason: str) -> None:
        """Names a file or folder that cannot be read."""
        self.left_out.append(Skipped(printable(name), reason))

    def add(self, other: "Findings") -> None:
        """Adds what another listing found."""
        self.seen.update(other.seen)
        self.left_aside.update(other.left_aside)
        self.left_out.extend(other.left_out)


def in_system_folder(key: str, findings: Findings) -> bool:
    """Whether ``key`` lies in a hidden folder or one of ``_SYSTEM_FOLDERS``, which is then counted."""
    for name in key.split("/")[:-1]:
        if is_system_folder(name):
            findings.aside(f"in {printable(name)}/")
            return True
    return False


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name is left aside, with all that is in it."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot; "no suffix"; or "other suffixes" for what is more a part of the name."""
    suffix = os.path.splitext(name)[1].lower()
    if not suffix:
        return "no suffix"
    return suffix if _SUFFIX.fullmatch(suffix) else "other suffixes"


def is_utf8(name: str) -> bool:
    """Whether the name can be stored. Python reads one in another encoding with placeholders for its bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    r"""The name for messages and JSON: bytes that are not UTF-8 and control characters as \x.."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
