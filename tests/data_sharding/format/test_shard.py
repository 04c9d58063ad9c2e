"""The stored format: other programs read it, each frame is readable alone, and damage is refused."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import zstandard

from data_sharding.errors import DataError
from data_sharding.format.manifest import Manifest
from data_sharding.format.shard import END_OF_ARCHIVE, Sample, decompress, pack_sample, parse_frame, scan_frame
from data_sharding.stream.frames import fetch_frame, open_frame, read_frame
from tests.support.samples import CLASSES, assert_same, make_sample


def members_of(samples: list[Sample]) -> dict[str, bytes]:
    members = {}
    for i, s in enumerate(samples):
        for view, array in s.views.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            members[f"{s.id:016x}.{view}.npy"] = buffer.getvalue()
        name = CLASSES[s.label]
        record = {"id": s.id, "label": s.label, "class": name, "source": f"{name}/{i}.jpg", "pixels": [300, 400]}
        members[f"{s.id:016x}.json"] = json.dumps(record).encode()
    return members


# Other programs


@pytest.mark.skipif(not (shutil.which("zstd") and shutil.which("tar")), reason="needs the zstd and tar programs")
def test_zstd_and_tar_extract_every_member(stored_samples, tmp_path):
    path, samples = stored_samples
    for shard in sorted(path.glob("*.tar.zst")):
        subprocess.run(f"set -o pipefail; zstd -dc '{shard}' | tar x", shell=True, executable="/bin/bash", cwd=tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == members_of(samples)


def test_python_tarfile_reads_the_stream_across_frames_and_sees_no_time_or_owner(stored_samples):
    path, samples = stored_samples
    members = {}
    for shard in sorted(path.glob("*.tar.zst")):
        raw = zstandard.ZstdDecompressor().stream_reader(shard.read_bytes(), read_across_frames=True).read()
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
                members[info.name] = tar.extractfile(info).read()
    assert members == members_of(samples)


def test_webdataset_reads_it_with_its_own_pipeline(stored_samples):
    wds = pytest.importorskip("webdataset")
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def open_zst(sources):
        for source in sources:
            with open(source["url"], "rb") as file:
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                yield {"url": source["url"], "stream": reader}

    path, samples = stored_samples
    urls = [str(shard) for shard in sorted(path.glob("*.tar.zst"))]
    pipeline = wds.DataPipeline(wds.SimpleShardList(urls), open_zst, tar_file_expander, group_by_keys, wds.decode())
    found = list(pipeline)
    assert [record["__key__"] for record in found] == [f"{s.id:016x}" for s in samples]
    for record, sample in zip(found, samples, strict=True):
        assert record["json"]["label"] == sample.label
        assert {k.removesuffix(".npy") for k in record if k.endswith(".npy")} == sample.views.keys()
        for view, array in sample.views.items():
            np.testing.assert_array_equal(record[f"{view}.npy"], array)


# One frame


def test_every_frame_alone_gives_its_samples(stored_samples):
    path, samples = stored_samples
    manifest = Manifest.load(str(path))
    assert len(manifest.frame_shard) >= 5  # several frames in a shard and several shards, or this shows little
    for f in reversed(range(len(manifest.frame_shard))):
        assert_same(read_frame(manifest, f), samples[manifest.frame_first[f] : manifest.frame_first[f + 1]])


def test_a_scan_agrees_with_the_manifest(stored_samples):
    path, samples = stored_samples
    manifest = Manifest.load(str(path))
    rows = [row for f in range(len(manifest.frame_shard)) for row in scan_frame(*frame_of(manifest, f))]
    assert rows == [(s.id, s.label, s.size) for s in samples]


def test_an_array_longer_or_shorter_than_it_says_is_refused():
    raw = pack_sample(make_sample(0), class_name="cat", source="cat/0.jpg", pixels=(1, 1))
    shape = b"'shape': (2, 12, 16, 16)"
    assert raw.count(shape) == 1
    for wrong in (b"'shape': (2, 12, 15, 16)", b"'shape': (2, 13, 16, 16)"):
        damaged = raw.replace(shape, wrong)
        frame = zstandard.ZstdCompressor(write_content_size=True).compress(damaged)
        for read in (parse_frame, scan_frame):
            with pytest.raises(ValueError, match="resize.npy holds 12288 bytes of values, not those of"):
                read(frame, len(damaged))


def frame_of(manifest: Manifest, f: int) -> tuple[bytes, int]:
    return fetch_frame(manifest, f), int(manifest.frame_raw_bytes[f])


@pytest.mark.parametrize("record", [{}, {"label": None}, {"label": "3"}, {"label": 3.0}, {"label": True}, {"label": -1},
                                    {"label": 2**31}])  # fmt: skip
def test_a_sample_without_a_whole_number_as_its_label_is_refused(record):
    sample = Sample(7, 3, {"resize": np.zeros((2, 1, 1, 16), np.float16)})
    raw = pack_sample(sample, class_name="ant", source="ant/1.png", pixels=(16, 16))
    at = raw.index(b".json") - 16  # of the last member
    text = json.dumps({"id": 7} | record).encode()
    head = tarfile.TarInfo(f"{7:016x}.json")
    head.size = len(text)
    edited = raw[:at] + head.tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % 512)
    frame = zstandard.ZstdCompressor(write_content_size=True).compress(edited)
    for parse in (parse_frame, scan_frame):
        with pytest.raises(ValueError, match=r"0000000000000007\.json has the label .*, not a whole number"):
            parse(frame, len(edited))


def test_end_of_archive_is_a_frame_of_its_own(stored_samples):
    path, _ = stored_samples
    manifest = Manifest.load(str(path))
    for number, shard in enumerate(manifest.shards):
        last = np.flatnonzero(manifest.frame_shard == number)[-1]
        rest = (path / shard.name).read_bytes()[manifest.frame_offset[last] + manifest.frame_bytes[last] :]
        assert decompress(rest, len(END_OF_ARCHIVE)) == END_OF_ARCHIVE == bytes(1024)


def test_a_frame_is_never_read_short_or_long(stored_samples):
    path, _ = stored_samples
    manifest = Manifest.load(str(path))
    first, second = fetch_frame(manifest, 0), fetch_frame(manifest, 1)
    raw_bytes = int(manifest.frame_raw_bytes[0])
    for damaged, size in (
        (first + second, raw_bytes),  # zstandard's decompress() would return the first frame without an error
        (first[:-1], raw_bytes),  # its stream readers end here without an error
        (first[: len(first) // 2], raw_bytes),
        (b"", raw_bytes),
        (first, raw_bytes + 512),
        (first, raw_bytes - 512),
    ):
        with pytest.raises(ValueError, match="are not one whole frame"):
            parse_frame(damaged, size)
        with pytest.raises(DataError, match="frame 0"):
            open_frame(manifest, 0, damaged if damaged is not first else first[:-1])


def test_samples_are_their_own_memory(stored_samples):
    """A view into the frame would keep a megabyte alive for one image, and could not be written to."""
    manifest = Manifest.load(str(stored_samples[0]))
    array = read_frame(manifest, 0)[0].views["resize"]
    assert array.flags.owndata or array.base.nbytes == array.nbytes
    assert array.flags.writeable


def test_the_bytes_are_frozen():
    """The tar inside, not the zstd around it: that may change with the library's version."""
    views = {"resize": np.arange(2 * 2 * 3 * 16, dtype=np.float16).reshape(2, 2, 3, 16)}
    raw = pack_sample(Sample(0x00C3A1F26B90D4E7, 3, views), class_name="Käfer", source="Käfer/1.jpg", pixels=(35, 50))
    assert len(raw) == 512 + 512 + 512 + 512 and raw[:24] == b"00c3a1f26b90d4e7.resize."
    assert hashlib.sha256(raw).hexdigest() == "c51a139e2a8342b83c62c1f52e96219ef21b4ee056d3f3aacd1ea31234aa9963"


def test_objects_in_an_array_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    whole = pack_sample(make_sample(0), class_name="cat", source="cat/0.jpg", pixels=(1, 1))
    member = io.BytesIO()
    with tarfile.open(fileobj=member, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(f"{1000:016x}.resize.npy")
        info.size = len(buffer.getvalue())
        tar.addfile(info, io.BytesIO(buffer.getvalue()))
    blocks = 512 + -(-info.size // 512) * 512
    raw = member.getvalue()[:blocks] + whole
    with pytest.raises(ValueError, match="holds objects"):
        parse_frame(zstandard.ZstdCompressor(write_content_size=True).compress(raw), len(raw))
