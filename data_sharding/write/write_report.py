"""What was written, and what of the source was not: the report of `fitv2 shard write` and `import`.

DST/source.json keeps the counts of the source for later calls:

    {"seen": {".jpg": 60, ".txt": 2}, "left_aside": {".txt": 2, "folder .git": 1}, "several_frames": 3}
"""

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.format.manifest import Manifest
from data_sharding.storage.files import exists, put, read
from data_sharding.storage.json_bytes import from_json, to_json
from data_sharding.storage.records import Count, ListOf, Shape
from data_sharding.write.entries import listed
from data_sharding.write.findings import Findings

COUNTS, SKIPPED = "source.json", "skipped.json"
_KINDS = 8  # of files, in a line
_REASONS = 4


class LeftOut(Shape):
    """An image in skipped.json."""

    source: str
    reason: str


class _Counts(Shape):
    """source.json."""

    seen: dict[str, Count] = {}
    left_aside: dict[str, Count] = {}
    several_frames: Count = 0


@dataclass(frozen=True)
class WriteReport:
    """``images`` and ``held_out`` are in the two datasets, ``skipped`` in neither; this call wrote ``encoded``.

    ``seen`` counts the source's files by suffix, ``left_aside`` those that are no images by their name (and folders
    with all that is in them), ``reasons`` why images were skipped. ``several_frames`` images are the first of several
    in their file. All four are empty for a dataset of an earlier version. ``without_images`` are classes.
    ``sorted_as_text`` is empty, or holds a class whose name is a number with its label, which is another one.
    """

    url: str
    images: int
    held_out: int
    skipped: int
    shards: int
    bytes: int
    encoded: int
    seconds: float
    classes: int
    without_images: tuple[str, ...]
    seen: dict[str, int]
    left_aside: dict[str, int]
    reasons: dict[str, int]
    several_frames: int
    sorted_as_text: dict[str, int]


def put_counts(url: str, findings: Findings, several_frames: int) -> None:
    """Writes source.json."""
    put(f"{url}/{COUNTS}", to_json(counts_of(findings) | {"several_frames": several_frames}, indent=1))


def counts_of(findings: Findings) -> dict[str, dict[str, int]]:
    """``seen`` and ``left_aside`` of a source, as in ``WriteReport``."""
    return {"seen": _sorted(findings.seen), "left_aside": _sorted(findings.left_aside)}


def report_of(urls: list[str], made: int, started: float) -> WriteReport:
    """The report on the finished dataset at ``urls[0]``, and its holdout if there is another URL."""
    manifests = [Manifest.load(url) for url in urls]
    headers = [manifest.header for manifest in manifests]
    totals = {key: sum(h.totals[key] for h in headers) for key in ("samples", "skipped", "bytes")}
    classes = headers[0].classes
    images_of = np.sum([np.bincount(manifest.label, minlength=len(classes)) for manifest in manifests], 0).tolist()
    counts, reasons = _record(f"{urls[0]}/{COUNTS}", _Counts, {}), Counter()
    for skipped in _record(f"{urls[0]}/{SKIPPED}", ListOf[LeftOut], []) if totals["skipped"] else []:
        reasons[_kind(skipped["reason"])] += 1
    return WriteReport(
        url=urls[0],
        images=headers[0].totals["samples"],
        held_out=totals["samples"] - headers[0].totals["samples"],
        skipped=totals["skipped"],
        shards=sum(len(h.shards) for h in headers),
        bytes=totals["bytes"],
        encoded=made,
        seconds=time.monotonic() - started,
        classes=len(classes),
        without_images=tuple(name for name, count in zip(classes, images_of, strict=True) if not count),
        seen=counts.get("seen", {}),
        left_aside=counts.get("left_aside", {}),
        reasons=_sorted(reasons),
        several_frames=counts.get("several_frames", 0),
        sorted_as_text=_sorted_as_text(classes),
    )


def to_text(report: WriteReport) -> str:
    """The report for a terminal: a line on what was written, and one on each thing that was not."""
    held_out = f", {report.held_out} of them held out" if report.held_out else ""
    lines = [
        f"{report.url}: {report.images + report.held_out} images of {report.classes} classes in {report.shards} shards"
        f"{held_out}, {report.bytes / 1e6:.1f} MB"
    ]
    lines += counts_to_text(report.seen, report.left_aside)
    if report.skipped:
        lines.append(f"  images left out, named in {SKIPPED}: {_counted(report.reasons, _REASONS)}")
    if report.several_frames:
        lines.append(f"  files with several frames or pages, of which the first was taken: {report.several_frames}")
    if report.without_images:
        lines.append(f"  classes without an image: {len(report.without_images)} ({listed(report.without_images)})")
    for name, label in report.sorted_as_text.items():
        lines.append(f'  classes of numbers are sorted as text, as in torchvision: class "{name}" is label {label}')
    return "\n".join(lines)


def counts_to_text(seen: Mapping[str, int], left_aside: Mapping[str, int]) -> list[str]:
    """Lines for a terminal on what a source holds besides images."""
    lines = [f"  files seen: {sum(seen.values())} ({_counted(seen, _KINDS)})"] if seen else []
    return lines + ([f"  no images by their names, left aside: {_counted(left_aside, _KINDS)}"] if left_aside else [])


def _sorted_as_text(classes: Sequence[str]) -> dict[str, int]:
    """The first class that is out of the order of numbers, with its label, if all names are whole numbers."""
    if not all(name.isascii() and name.isdecimal() for name in classes):
        return {}
    places = enumerate(zip(classes, sorted(classes, key=int), strict=True))
    return next(({name: label} for label, (name, numeric) in places if name != numeric), {})


def _counted(counts: Mapping[str, int], most: int) -> str:
    first = [f"{name} {count}" for name, count in list(counts.items())[:most]]
    rest = sum(list(counts.values())[most:])
    return ", ".join([*first, f"{len(counts) - most} other kinds {rest}"] if rest else first)


def _kind(reason: str) -> str:
    """The reason without what differs from file to file."""
    return re.sub(r"\d+", "…", reason.partition(" (")[0].partition(": ")[0])


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _record(url: str, shape: type[Shape | ListOf], default: Any) -> Any:
    remedy = "it is only a report: remove it"
    return from_json(read(url), url, shape, remedy) if exists(url) else default
