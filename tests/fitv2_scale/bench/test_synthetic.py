"""Datasets of a manifest only are datasets to all that plans."""

import numpy as np

from data_sharding.format.manifest import Manifest
from fitv2_scale.bench.synthetic import write_columns


def test_a_manifest_of_columns_only(tmp_path):
    write_columns(str(tmp_path / "set"), 3000)
    manifest = Manifest.load(str(tmp_path / "set"))
    assert manifest.sample_id.tolist() == list(range(3000))
    assert np.bincount(manifest.label, minlength=1000).tolist() == [3] * 1000
    assert [s.samples for s in manifest.shards] == [1024, 1024, 952] and manifest.header.totals["samples"] == 3000
    assert manifest.frame_first.tolist() == [*range(0, 3000, 64), 3000]
    assert (manifest.size.astype(int).prod(-1) <= 256).all()
