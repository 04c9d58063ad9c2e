"""The stored format: what other programs read, what a frame alone gives, and what the manifest refuses."""

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile

import fsspec
import numpy as np
import pytest
import xxhash
import zstandard

from data_sharding.columns import COLUMNS
from data_sharding.errors import DataError
from data_sharding.frames import fetch_frame, open_frame, read_frame
from data_sharding.manifest import Manifest, write_manifest
from data_sharding.shard import END_OF_ARCHIVE, Sample, ShardBuilder, decompress, pack_sample, parse_frame, scan_frame
from data_sharding.storage import put

CLASSES = ("cat", "dog", "eel")


def make_sample(i: int) -> Sample:
    rng = np.random.default_rng(i)
    sizes = {"resize": (12 + i % 5, 16)} | ({"crop": (16, 16)} if i % 3 else {})
    views = {view: rng.standard_normal((2, *hw, 16)).astype(np.float16) for view, hw in sizes.items()}
    return Sample(id=1000 + (i << 50), label=i % 3, views=views)


def write_samples(url: str, per_shard: tuple[int, ...] = (70, 1, 45)) -> list[Sample]:
    samples, indexes = [], []
    for number, count in enumerate(per_shard):
        builder = ShardBuilder(f"shard-{number:06d}.tar.zst")
        for _ in range(count):
            sample = make_sample(len(samples))
            name = CLASSES[sample.label]
            builder.add(sample, class_name=name, source=f"{name}/{len(samples)}.jpg", pixels=(300, 400))
            samples.append(sample)
        data, index = builder.finish()
        put(f"{url}/{index.name}", data)
        indexes.append(index)
    write_manifest(
        url,
        indexes,
        codec={"name": "dct", "digest": "00", "scale": 1.0},
        dtype="float16",
        max_tokens=256,
        classes=CLASSES,
        skipped=0,
        source={"digest": "00", "images_per_shard": 70, "holdout": 0.0},
    )
    return samples


def assert_same(found: list[Sample], expected: list[Sample]) -> None:
    assert [s.id for s in found] == [s.id for s in expected]
    assert [s.label for s in found] == [s.label for s in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.views.keys() == b.views.keys()
        for view in a.views:
            assert a.views[view].dtype == np.float16
            assert a.views[view].tobytes() == b.views[view].tobytes() and a.views[view].shape == b.views[view].shape


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


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset")
    return path, write_samples(str(path))


# what other programs read


@pytest.mark.skipif(not (shutil.which("zstd") and shutil.which("tar")), reason="needs the zstd and tar programs")
def test_zstd_and_tar_extract_every_member(stored, tmp_path):
    path, samples = stored
    for shard in sorted(path.glob("*.tar.zst")):
        subprocess.run(f"set -o pipefail; zstd -dc '{shard}' | tar x", shell=True, executable="/bin/bash", cwd=tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == members_of(samples)


def test_python_tarfile_reads_the_stream_across_frames_and_sees_no_time_or_owner(stored):
    path, samples = stored
    members = {}
    for shard in sorted(path.glob("*.tar.zst")):
        raw = zstandard.ZstdDecompressor().stream_reader(shard.read_bytes(), read_across_frames=True).read()
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
                members[info.name] = tar.extractfile(info).read()
    assert members == members_of(samples)


def test_webdataset_reads_it_with_its_own_pipeline(stored):
    wds = pytest.importorskip("webdataset")
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def open_zst(sources):
        for source in sources:
            with open(source["url"], "rb") as file:
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                yield {"url": source["url"], "stream": reader}

    path, samples = stored
    urls = [str(shard) for shard in sorted(path.glob("*.tar.zst"))]
    pipeline = wds.DataPipeline(wds.SimpleShardList(urls), open_zst, tar_file_expander, group_by_keys, wds.decode())
    found = list(pipeline)
    assert [record["__key__"] for record in found] == [f"{s.id:016x}" for s in samples]
    for record, sample in zip(found, samples, strict=True):
        assert record["json"]["label"] == sample.label
        assert {k.removesuffix(".npy") for k in record if k.endswith(".npy")} == sample.views.keys()
        for view, array in sample.views.items():
            np.testing.assert_array_equal(record[f"{view}.npy"], array)


# one frame


def test_every_frame_alone_gives_its_samples(stored):
    path, samples = stored
    manifest = Manifest.load(str(path))
    assert len(manifest.frame_shard) >= 5  # several frames in a shard and several shards, or this shows little
    for f in reversed(range(len(manifest.frame_shard))):
        assert_same(read_frame(manifest, f), samples[manifest.frame_first[f] : manifest.frame_first[f + 1]])


def test_a_scan_says_what_the_manifest_says(stored):
    path, samples = stored
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


def test_end_of_archive_is_a_frame_of_its_own(stored):
    path, _ = stored
    manifest = Manifest.load(str(path))
    for number, shard in enumerate(manifest.shards):
        last = np.flatnonzero(manifest.frame_shard == number)[-1]
        rest = (path / shard.name).read_bytes()[manifest.frame_offset[last] + manifest.frame_bytes[last] :]
        assert decompress(rest, len(END_OF_ARCHIVE)) == END_OF_ARCHIVE == bytes(1024)


def test_a_frame_is_never_read_short_or_long(stored):
    path, _ = stored
    manifest = Manifest.load(str(path))
    first, second = fetch_frame(manifest, 0), fetch_frame(manifest, 1)
    raw_bytes = int(manifest.frame_raw_bytes[0])
    for damaged, size in (
        (first + second, raw_bytes),  # zstandard's decompress() would return the first frame and say nothing
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


def test_samples_are_their_own_memory(stored):
    """A view into the frame would keep a megabyte alive for one image, and could not be written to."""
    manifest = Manifest.load(str(stored[0]))
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


# the manifest


def test_manifest_gives_what_was_written(stored):
    path, samples = stored
    m = Manifest.load(f"file://{path}/")
    assert m.digest == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    assert m.classes == CLASSES
    assert m.sample_id.tolist() == [s.id for s in samples] and m.label.tolist() == [s.label for s in samples]
    assert m.size.tolist() == [[list(hw) for hw in s.size] for s in samples]
    assert isinstance(m.sample_id, np.memmap)
    assert m.frame_url(len(m.frame_shard) - 1).endswith("/shard-000002.tar.zst")
    for name, (dtype, _, _) in COLUMNS.items():
        assert getattr(m, name).dtype == np.dtype(dtype)
    shard = (path / m.shards[0].name).read_bytes()
    frame = shard[: m.frame_bytes[0]]
    assert [hex(word) for word in m.frame_digest[0].tolist()] == [
        hex(xxhash.xxh3_128_intdigest(frame) & (1 << 64) - 1), hex(xxhash.xxh3_128_intdigest(frame) >> 64),
    ]  # fmt: skip
    assert m.shards[0].xxh3_128 == xxhash.xxh3_128_hexdigest(shard) and m.shards[0].bytes == len(shard)


def test_any_fsspec_url_will_do():
    url = "memory://test_shard_format/set"
    samples = write_samples(url, (3, 2))
    manifest = Manifest.load(url)
    assert_same(read_frame(manifest, 0) + read_frame(manifest, 1), samples)
    fsspec.filesystem("memory").rm("/test_shard_format", recursive=True)


def test_no_dataset_is_one_sentence(tmp_path):
    with pytest.raises(
        DataError, match="there is no dataset at .*: write one with `fitv2 shard write` or `fitv2 shard imp"
    ):
        Manifest.load(str(tmp_path / "nothing"))
    (tmp_path / "parts").mkdir()
    with pytest.raises(DataError, match="unfinished, run the same `fitv2 shard write` or `import` again"):
        Manifest.load(str(tmp_path))


def rewrite(path, **edits):
    """Rewrites columns, and the header so that its digests agree with them."""
    header = json.loads((path / "manifest.json").read_bytes())
    for name, edit in edits.items():
        file = path / "manifest" / f"{name}.npy"
        np.save(file, edit(np.load(file)))
        data = file.read_bytes()
        header["columns"][file.name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    (path / "manifest.json").write_text(json.dumps(header))


def put_at(index, value):
    def edit(column):
        column[index] = value
        return column

    return edit


@pytest.fixture
def copied(stored, tmp_path):
    shutil.copytree(stored[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("column", "edit", "message"),
    [
        ("label", put_at(3, 3), r"labels 0 \.\. 3 do not fit 3 classes"),
        ("label", lambda c: c[:-1], r"label\.npy is int32\[115\], not int32\[116\]"),
        ("label", lambda c: c.astype(np.int64), "is int64"),
        ("size", put_at((0, 0), 0), r"views hold 0 \.\."),
        ("size", put_at((0, 0), 17), r"289 tokens, not 1 \.\. 256"),
        ("frame_first", put_at(1, 0), "do not cover the samples"),
        ("frame_first", put_at(-1, 9), "do not cover the samples"),
        ("frame_offset", put_at(1, 5), "do not follow one another"),
        ("frame_bytes", put_at(-1, 1 << 40), "ends behind the end of its shard"),
        ("frame_shard", put_at(0, 1), "not listed shard by shard"),
        ("sample_id", put_at(0, -1), "ids are negative"),
    ],
)
def test_contradictions_are_named_with_their_file(copied, column, edit, message):
    rewrite(copied, **{column: edit})
    with pytest.raises(DataError, match=message) as error:
        Manifest.load(str(copied))
    assert f"{column}.npy" in str(error.value) and "write the dataset anew" in str(error.value)


def test_damaged_missing_and_foreign_files_are_named(copied):
    file = copied / "manifest" / "label.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"label\.npy does not match its digest"):
        Manifest.load(str(copied))
    file.write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"label\.npy is not a whole"):
        Manifest.load(str(copied))
    file.unlink()
    with pytest.raises(DataError, match=r"label\.npy is missing"):
        Manifest.load(str(copied))
    header = json.loads((copied / "manifest.json").read_bytes())
    for edit, message in (
        ({"version": 2}, "version 2, this program reads"),
        ({"class_count": 4}, "contradicts itself"),
        ({"totals": {**header["totals"], "bytes": 1}}, "contradicts itself"),
        ({"columns": {}}, "contradicts itself"),
        ({"shards": [{"name": "x"}]}, "is damaged"),
    ):
        (copied / "manifest.json").write_text(json.dumps({**header, **edit}))
        with pytest.raises(DataError, match=message):
            Manifest.load(str(copied))
    (copied / "manifest.json").write_bytes(b'{"format"')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(str(copied))


def test_frames_that_disagree_with_the_manifest_are_refused(stored):
    manifest = Manifest.load(str(stored[0]))
    for column, value in (("sample_id", 7), ("label", 2), ("size", 3)):
        other = np.array(getattr(manifest, column))
        other[0] = value
        with pytest.raises(DataError, match=rf"shard-000000.tar.zst, frame 0 .*disagree with the manifest's {column}"):
            read_frame(dataclasses.replace(manifest, **{column: other}), 0)
    missing = dataclasses.replace(manifest, url=f"{manifest.url}/elsewhere")
    with pytest.raises(DataError, match=r"elsewhere/shard-000000\.tar\.zst, frame 0 .*the shard is missing"):
        read_frame(missing, 0)
