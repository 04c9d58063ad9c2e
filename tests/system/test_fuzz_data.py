"""Everything that reads a dataset, or images to make one of, survives what a stranger could have written."""

import io
import json
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
import xxhash
import zstandard

from data_sharding.format.manifest import Header, Manifest
from data_sharding.format.shard import RawFrame, parse_frame, scan_frame
from data_sharding.write.image_sources import open_source
from fitv2_scale.evaluate.reference_statistics import open_reference
from tests.support.fuzzing import COUNTS, as_json, edited_bytes, edited_trees, fuzz, one_of
from tests.support.pictures import file_of, noise
from tests.support.repository import ROOT

DATASET = ROOT / "tests/fixtures/made_by_a2e80d5/dataset"
HEADER = (DATASET / "manifest.json").read_bytes()


@COUNTS
def test_header_of_a_manifest(count):
    inputs = one_of(edited_bytes([HEADER]), as_json(edited_trees([json.loads(HEADER)])))
    fuzz(inputs, lambda data: Header.from_json(data, "manifest.json"), count)


@COUNTS
def test_columns_of_a_manifest(count, tmp_path):
    """One column is edited, and its digest is right."""
    columns = {file.stem: file.read_bytes() for file in (DATASET / "manifest").glob("*.npy")}
    (tmp_path / "manifest").mkdir()
    for name, data in columns.items():
        (tmp_path / f"manifest/{name}.npy").write_bytes(data)

    def read(edit: tuple[str, bytes]) -> None:
        name, data = edit
        header = json.loads(HEADER)
        header["columns"][f"{name}.npy"] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        (tmp_path / "manifest.json").write_text(json.dumps(header))
        (tmp_path / f"manifest/{name}.npy").write_bytes(data)
        try:
            Manifest.load(str(tmp_path))
        finally:
            (tmp_path / f"manifest/{name}.npy").write_bytes(columns[name])

    edits = [lambda rng, name=name, data=data: (name, edited_bytes([data])(rng)) for name, data in columns.items()]
    fuzz(one_of(*edits), read, count, size=lambda edit: len(edit[1]))


@COUNTS
def test_frames_of_a_shard(count):
    """Edited bytes of a frame, and whole frames of edited members."""
    manifest = Manifest.load(str(DATASET))
    frames = []
    for f in range(min(3, len(manifest.frame_bytes))):
        begin, size = int(manifest.frame_offset[f]), int(manifest.frame_bytes[f])
        frames.append(Path(manifest.frame_url(f)).read_bytes()[begin : begin + size])
    raws = [zstandard.ZstdDecompressor().decompress(frame) for frame in frames]

    def read(frame_and_size: tuple[bytes, int]) -> None:
        for parse in (parse_frame, scan_frame):
            with suppress(ValueError):
                parse(*frame_and_size)
        raw = RawFrame(*frame_and_size)
        for sample in range(len(raw.ids)):
            for view in ("resize", "crop"):
                with suppress(KeyError):  # it has no such view
                    raw.view(sample, view)

    compress = zstandard.ZstdCompressor(level=1, write_content_size=True).compress

    def whole(rng: Random) -> tuple[bytes, int]:
        raw = edited_bytes(raws)(rng)
        return compress(raw), len(raw)

    broken = lambda rng: (edited_bytes(frames)(rng), len(rng.choice(raws)))  # noqa: E731
    fuzz(one_of(whole, broken), read, count, allowed=(ValueError,), size=lambda pair: len(pair[0]) + pair[1])


def webdataset() -> bytes:
    members = {
        f"{i:04d}.{kind}": data
        for i in range(3)
        for kind, data in (("png", file_of(noise(8, 8, i), "PNG")), ("cls", b"%d" % i))
    }
    members["0003.jpg"], members["0003.json"] = file_of(noise(16, 8), "JPEG"), b'{"label": 1}'
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@COUNTS
def test_tars_of_images(count, tmp_path):
    tar = tmp_path / "train.tar"

    def read(data: bytes) -> None:
        tar.write_bytes(data)
        for entry in open_source(str(tar)).entries:
            entry.data.read()

    fuzz(edited_bytes([webdataset()]), read, count)


def npz(**members: bytes) -> bytes:
    """An .npz whose members are these bytes, with the right check sums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@COUNTS
def test_reference_statistics(count, tmp_path):
    rows = np.random.default_rng(0).normal(size=(16, 3))
    good = {"mu": npy(rows.mean(0)), "sigma": npy(np.cov(rows.T)), "pool": npy(rows.astype(np.float32))}
    file = tmp_path / "reference.npz"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        open_reference(str(file), None, None, 10)

    def with_member(rng: Random) -> bytes:
        name = rng.choice(sorted(good))
        return npz(**good | {name: edited_bytes([good[name]])(rng)})

    fuzz(one_of(with_member, edited_bytes([npz(**good)])), read, count)


@pytest.mark.parametrize("name", ["reference.npz"])
def test_the_seeds_are_valid(name, tmp_path):
    """Else all of the inputs above would be refused for one reason."""
    Header.from_json(HEADER, "manifest.json")
    (tmp_path / "train.tar").write_bytes(webdataset())
    assert len(open_source(str(tmp_path / "train.tar")).entries) == 4
    rows = np.random.default_rng(0).normal(size=(16, 3))
    (tmp_path / name).write_bytes(npz(mu=npy(rows.mean(0)), sigma=npy(np.cov(rows.T))))
    assert open_reference(str(tmp_path / name), None, None, 10).pool.mean.shape == (3,)
