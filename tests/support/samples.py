"""Datasets of made-up samples, and ways to damage them."""

import json

import numpy as np
import pytest
import xxhash

from data_sharding.format.manifest import write_manifest
from data_sharding.format.shard import Sample, ShardBuilder
from data_sharding.storage.files import put

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


@pytest.fixture(scope="session")
def stored_samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset")
    return path, write_samples(str(path))


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
