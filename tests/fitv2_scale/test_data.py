"""The data of a run: a batch that changes on the way, and datasets mixed by weight."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from fitv2_scale.data import Data
from fitv2_scale.train.loop import DONE, train
from tests.support.ranks import run_ranks
from tests.support.run_history import losses, trained
from tests.support.tiny_runs import IMAGES


def test_a_changed_batch_begins_at_the_next_window(tiny):
    """Windows are 20 steps of 12 images, an epoch; then 24 images a step, and every image once an epoch still."""
    assert run_ranks(2, train, tiny(train__steps=13)) == [DONE] * 2
    changed = tiny(train__steps=30, batch__images=24)
    assert run_ranks(3, train, changed) == [DONE] * 3
    begun, cursor = Data.open(tiny(), (1,)), Data.open(tiny(), (1,)).plan.cursor(13)
    said = Data.open(changed, (1,)).continued(cursor, 13, changed)[1]
    assert said == ["from step 20, the next window boundary: 24 images per step"]
    assert begun.continued(cursor, 13, tiny())[1] == []
    steps = trained(changed.run)
    assert [len(images) for images in steps.values()] == [12] * 20 + [24] * 10
    seen = Counter((epoch, image) for images in steps.values() for epoch, image, *_ in images)
    assert set(seen.values()) == {1} and Counter(epoch for epoch, _ in seen) == {0: IMAGES, 1: IMAGES}


def test_two_datasets_are_mixed_by_weight(tiny, dataset):
    """One part of the first to three of the second, the same images under ids of their own, on one rank and on two."""
    changes = {"data__url": [dataset, dataset], "data__weights": [1.0, 3.0], "train__steps": 40}
    one, two = tiny("one", **changes), tiny("two", **changes)
    assert run_ranks(1, train, one) == [DONE]
    assert run_ranks(2, train, two) == [DONE] * 2
    assert trained(one.run) == trained(two.run)
    assert losses(two.run) == pytest.approx(losses(one.run), rel=1e-6)
    epochs = Counter(epoch for images in trained(one.run).values() for epoch, *_ in images)
    assert epochs == {0: 120 + 240, 1: 120}  # of 480 images 120 from the first set, 360 from the second


def test_latents_of_two_codecs_are_not_mixed(tiny, dataset, tmp_path):
    """As if a second VAE had written a copy of the same images."""
    other = shutil.copytree(dataset, tmp_path / "other")
    header = json.loads((other / "manifest.json").read_text())
    header["codec"]["digest"] = "0" * len(header["codec"]["digest"])
    Path(other, "manifest.json").write_text(json.dumps(header))
    assert Data.open(tiny(data__url=[str(other)]), (1,)).classes == 5  # by itself it is a dataset like any other
    for urls in ([dataset, str(other)], [str(other), dataset]):
        with pytest.raises(UserError, match="were written with different codecs: write one of them again"):
            Data.open(tiny(data__url=urls), (1,))
