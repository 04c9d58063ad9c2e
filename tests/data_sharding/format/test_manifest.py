"""The manifest: it returns what was written, and an error names the file that contradicts it."""

import dataclasses
import hashlib
import json
import shutil

import fsspec
import numpy as np
import pytest
import xxhash

from data_sharding.errors import DataError
from data_sharding.format.columns import COLUMNS
from data_sharding.format.manifest import Manifest
from data_sharding.stream.frames import read_frame
from tests.support.samples import CLASSES, assert_same, put_at, rewrite, write_samples


def test_manifest_returns_what_was_written(stored_samples):
    path, samples = stored_samples
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


def test_any_fsspec_url_works():
    url = "memory://test_manifest/set"
    samples = write_samples(url, (3, 2))
    manifest = Manifest.load(url)
    assert_same(read_frame(manifest, 0) + read_frame(manifest, 1), samples)
    fsspec.filesystem("memory").rm("/test_manifest", recursive=True)


def test_no_dataset_is_one_sentence(tmp_path):
    with pytest.raises(
        DataError, match="there is no dataset at .*: write one with `fitv2 shard write` or `fitv2 shard imp"
    ):
        Manifest.load(str(tmp_path / "nothing"))
    (tmp_path / "parts").mkdir()
    with pytest.raises(DataError, match="unfinished; run the same `fitv2 shard write` or `import` again"):
        Manifest.load(str(tmp_path))


@pytest.fixture
def copied(stored_samples, tmp_path):
    shutil.copytree(stored_samples[0], tmp_path / "copy")
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
        ("frame_bytes", put_at(-1, 1 << 40), "ends after the end of its shard"),
        ("frame_shard", put_at(0, 1), "not listed shard by shard"),
        ("sample_id", put_at(0, -1), "ids are negative"),
    ],
)
def test_contradictions_are_named_with_their_file(copied, column, edit, message):
    rewrite(copied, **{column: edit})
    with pytest.raises(DataError, match=message) as error:
        Manifest.load(str(copied))
    assert f"{column}.npy" in str(error.value) and "write the dataset again" in str(error.value)


def test_damaged_missing_and_foreign_files_are_named(copied):
    file = copied / "manifest" / "label.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"label\.npy does not match its digest"):
        Manifest.load(str(copied))
    file.write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"label\.npy is not a complete"):
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
        ({"codec": {"name": "dct", "digest": "00", "scale": 1.0, "channels": 0}}, "the codec has 0 channels"),
        ({"codec": {"name": "dct", "digest": "00", "scale": 1.0, "channels": True}}, "the codec has True channels"),
        ({"codec": ["dct"]}, "is damaged"),
    ):
        (copied / "manifest.json").write_text(json.dumps({**header, **edit}))
        with pytest.raises(DataError, match=message):
            Manifest.load(str(copied))
    (copied / "manifest.json").write_bytes(b'{"format"')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(str(copied))


def test_frames_that_disagree_with_the_manifest_are_refused(stored_samples, tmp_path):
    manifest = Manifest.load(str(stored_samples[0]))
    for column, value in (("sample_id", 7), ("label", 2), ("size", 3)):
        other = np.array(getattr(manifest, column))
        other[0] = value
        with pytest.raises(DataError, match=rf"shard-000000.tar.zst, frame 0 .*disagree with the manifest's {column}"):
            read_frame(dataclasses.replace(manifest, **{column: other}), 0)
    copied = shutil.copytree(stored_samples[0], tmp_path / "set")
    (copied / "shard-000000.tar.zst").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar\.zst, frame 0 .*the shard is missing"):
        read_frame(Manifest.load(str(copied)), 0)
