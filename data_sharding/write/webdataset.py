"""WebDataset tars: samples are grouped by the webdataset library's own rule. A file's name ends at its first dot; what
follows is its suffix, and the files of a sample follow each other.

Of a sample's images the one with a plain suffix is taken: 0007.png, not 0007.depth.png. A sample with several such, or
with several images of which none is plain, is left out by name, since nothing says which one is meant.
"""

from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import NamedTuple

from data_sharding.errors import UserError
from data_sharding.storage.byte_ranges import ByteRange
from data_sharding.storage.tar_members import Member, list_tar
from data_sharding.write.entries import ImageSource, image_source, no_images
from data_sharding.write.findings import (
    Findings,
    in_system_folder,
    is_system_folder,
    is_utf8,
    printable,
    suffix_of,
)
from data_sharding.write.image_file import is_image_name
from data_sharding.write.labels import (
    BadLabel,
    Label,
    NoLabel,
    classes_of,
    describe,
    label_of,
    no_label,
    refused,
)

_MOST_IMAGES = 4  # in a sample; where names hold dots, all images of a tar may seem to be one sample


class Sample(NamedTuple):
    """An image with its label."""

    key: str
    label: Label
    data: ByteRange


def list_webdataset(urls: list[str], stems: list[str], in_parallel) -> ImageSource:
    """The samples of the tars; a sample's key begins with the tar's stem. ``in_parallel``: (work, items) to results.

    Raises:
        UserError: a tar is damaged or no WebDataset, a label is missing or no class, or a key occurs twice.
    """
    samples: dict[str, Sample] = {}
    findings = Findings()
    found = in_parallel(lambda pair: _samples(*pair), list(zip(urls, stems, strict=True)))
    for url, (listed, more) in zip(urls, found, strict=True):
        findings.add(more)
        for sample in listed:
            if sample.key in samples:
                raise _twice(url, sample.key)
            samples[sample.key] = sample
    if not samples:
        raise no_images(f"{urls[0]} holds", findings)
    classes, class_of = classes_of(urls[0], {key: sample.label for key, sample in samples.items()})
    return image_source(classes, {key: (class_of[key], s.data) for key, s in samples.items()}, findings)


def suffixes_beside_images(names: Iterable[str]) -> set[str]:
    """The suffixes, no images', of which about every sample with an image has a file, as labels do in a WebDataset."""
    images, others = [], []
    for name in names:
        if not any(map(is_system_folder, name.split("/"))):  # a hidden file is none either
            (images if is_image_name(name) else others).append(name)
    samples = {_sample_name(name) for name in images}
    beside = [(_sample_name(name), suffix_of(name)) for name in others if _sample_name(name) in samples]
    files, of_suffix = Counter(suffix for _, suffix in beside), Counter(suffix for _, suffix in set(beside))
    return {
        suffix
        for suffix, count in of_suffix.items()
        if 2 * count >= len(samples) and _MOST_IMAGES * files[suffix] >= len(images)
    }


def _sample_name(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _samples(url: str, stem: str) -> tuple[list[Sample], Findings]:
    findings = Findings()
    members: dict[str, Member] = {}
    for member in list_tar(url, unusable=lambda name, reason: _unusable(findings, stem, name, reason)):
        findings.file(member.name)
        if in_system_folder(member.name, findings):
            continue
        if not is_utf8(member.name):
            findings.unusable(f"{stem}/{member.name}", "the name is not UTF-8: rename the file")
        elif member.name in members:
            raise _twice(url, f"{stem}/{member.name}")
        else:
            members[member.name] = member
    grouped: set[str] = set()
    samples = []
    files = ({"fname": member.name, "data": member, "__url__": url} for member in members.values())
    try:
        for sample in webdataset_library().group_by_keys(files):
            of = {suffix: value for suffix, value in sample.items() if isinstance(value, Member)}
            grouped.update(member.name for member in of.values())
            if (found := _sample(url, stem, sample["__key__"], of, findings)) is not None:
                samples.append(found)
    except ValueError as error:
        raise UserError(f"{url} is not a WebDataset: {error.args[0]}") from error
    for name in members.keys() - grouped:
        if name.rpartition("/")[2].startswith("._"):  # macOS's tar writes one beside each file
            findings.aside("._ files of macOS")
            continue
        findings.unusable(f"{stem}/{name}", "its name has no part before the first dot, so it belongs to no sample")
    return samples, findings


def _twice(url: str, key: str) -> UserError:
    return UserError(
        f"{url}: the sample {printable(key)} occurs twice: keys must be unique in a tar, and so must the tars' names"
    )


def _unusable(findings: Findings, stem: str, name: str, reason: str) -> None:
    findings.file(name)
    findings.unusable(f"{stem}/{name}", reason)


def _sample(url: str, stem: str, name: str, of: dict[str, Member], findings: Findings) -> Sample | None:
    """The sample of the files ``of``, by suffix; None if it has no image or is left out."""
    images = {suffix: member for suffix, member in of.items() if is_image_name(f".{suffix}")}
    plain = [suffix for suffix in images if "." not in suffix] or list(images)
    others = [suffix for suffix in of if suffix not in images and not (images and suffix in ("cls", "json"))]
    for suffix in others:
        findings.aside(suffix_of(f"x.{suffix}"))
    if not images:
        return None
    if len(plain) > 1:
        suffixes = printable(" and ".join(f".{suffix}" for suffix in plain))
        reason = f"its sample holds several images ({suffixes}), and nothing says which one is meant"
        for suffix in images:
            findings.unusable(f"{stem}/{images[suffix].name}", reason)
        return None
    image = images[plain[0]]
    for suffix in images.keys() - {plain[0]}:
        findings.aside(f".{suffix} beside .{plain[0]}")
    where = printable(f"{url}: {image.name}")
    try:
        label = label_of({suffix: of[suffix].data.read() for suffix in ("cls", "json") if suffix in of})
    except BadLabel as error:
        raise refused(where, error) from error
    except NoLabel as error:
        raise no_label(where, describe(name, plain[0], [suffix for suffix in of if suffix != plain[0]])) from error
    return Sample(f"{stem}/{image.name}", label, image.data)


def webdataset_library() -> SimpleNamespace:
    """Its functions ``expand_urls`` and ``group_by_keys``. Raises UserError without the library."""
    try:
        from webdataset import shardlists, tariterators
    except ImportError as error:
        raise UserError("WebDataset tars need the package webdataset: pip install -e '.[webdataset]'") from error
    return SimpleNamespace(expand_urls=shardlists.expand_urls, group_by_keys=tariterators.group_by_keys)
