"""What a commit's manifest must be (a sample is in ``commit_files``). Its digest in the log shows that it is as it was
written, not that this program wrote it."""

from math import prod
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from data_sharding.storage.records import Count, Shape
from fitv2_scale.checkpoint.checksums import CHUNK

_ITEM = 4  # bytes of a float32


def _segment(values: list) -> list:
    if [type(value) for value in values] != [int, int, list] or not values[1]:
        raise ValueError("a segment is its first step, its images and its weights")
    return values


_Segment = Annotated[list[Count | list[Count]], AfterValidator(_segment)]


class _File(Shape):
    bytes: Count
    xxh3_128: list[str]


class _Box(Shape):
    offset: list[Count]
    shape: list[Count]
    file: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    begin: Count


class _Tensor(Shape):
    shape: list[Count]
    boxes: list[_Box]


class _Cursor(Shape):
    plan_hash: str
    ledger: Count
    schedule: Annotated[list[_Segment], Field(min_length=1)]
    epoch: list[Count]
    window: Count
    images: list[Count]


class _Manifest(Shape):
    step: Count
    attempt: Count
    cursor: _Cursor | None
    scalars: dict[str, float]
    accounting: dict[str, float] = {}
    moments: list[str]
    files: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], _File]
    tensors: dict[str, _Tensor]


def manifest_of(value: Any) -> dict[str, Any]:
    """``value``, if it is a manifest of ``commit_files.FORMAT``. Raises ValueError, with what is wrong in one line, if
    not."""
    manifest = _Manifest.check(value)
    for name, file in manifest["files"].items():
        if len(file["xxh3_128"]) != -(-file["bytes"] // CHUNK):
            raise ValueError(f"{name} has {len(file['xxh3_128'])} digests for {file['bytes']} bytes")
    for name, tensor in manifest["tensors"].items():
        _check_boxes(name, tensor["shape"], tensor["boxes"], manifest["files"])
    return manifest


def _check_boxes(name: str, shape: list[int], boxes: list[dict[str, Any]], files: dict[str, dict]) -> None:
    for box in boxes:
        if not len(box["offset"]) == len(box["shape"]) == len(shape):
            raise ValueError(f"a box of {name} has another number of dimensions")
        if any(start + length > full for start, length, full in zip(box["offset"], box["shape"], shape, strict=True)):
            raise ValueError(f"a box of {name} ends outside of it")
        if box["begin"] + prod(box["shape"]) * _ITEM > files.get(box["file"], {"bytes": -1})["bytes"]:
            raise ValueError(f"a box of {name} is not in its file")
    if sum(prod(box["shape"]) for box in boxes) != prod(shape):
        raise ValueError(f"the boxes of {name} are not all of it")
