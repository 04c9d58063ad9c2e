"""The data of a run: a batch that changes on the way, and datasets mixed by weight."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.plan.plan import Cursor
from data_sharding.plan.size_presets import open_preset
from fitv2_scale.data import Data, _segment
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.disk_usage import storage_report
from fitv2_scale.planning.forecast.pack_statistics import data_statistics
from fitv2_scale.planning.forecast.plan_report import forecast
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


@pytest.mark.parametrize("seed", range(4))
def test_a_resumed_attempt_packs_as_the_first_one_did(tiny, seed):
    """On the same ranks; windows are 20 steps, after the change 10, and differ in their lengths."""
    plain, changed = tiny(seed=seed), tiny(seed=seed, batch__images=24)
    first = Data.open(plain, (2,))
    assert first.continued(first.plan.cursor(45), 45, plain)[0].shapes == first.shapes
    begun = Data.open(changed, (2,)).continued(first.plan.cursor(13), 13, changed)[0]
    assert begun.shapes[0] == first.shapes[0] and begun.shapes.keys() == {0, 1}
    for step in (20, 35, 61):
        assert Data.open(changed, (2,)).continued(begun.plan.cursor(step), step, changed)[0].shapes == begun.shapes


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


def test_latents_that_the_model_does_not_take_are_refused_at_the_start(tiny, dataset, tmp_path):
    """The dataset's four channels, and as if it had 16; pictures of 32 pixels, with patches of 64."""
    with pytest.raises(UserError, match=f"{dataset} holds latents of 4 channels, and the model takes 16: set mod"):
        Data.open(tiny(model__latent_channels=16), (1,))
    other = shutil.copytree(dataset, tmp_path / "other")
    header = json.loads((other / "manifest.json").read_text())
    header["codec"]["channels"] = 16
    Path(other, "manifest.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=r"16 channels, and the model takes 4: set model\.latent_channels=16, or give"):
        Data.open(tiny(data__url=str(other)), (1,))
    small = (Manifest.load(dataset).size[:, 0].min(-1) < 4).sum()
    with pytest.raises(UserError, match=rf"^{small} of the 240 images of {dataset} are less than one patch of 64 x 64"):
        run_ranks(2, train, tiny(model__patch=8))
    assert not Path(tiny().run, "steps").exists()


def test_packs_and_their_figures_count_the_tokens_of_the_network(tiny):
    """Of 16 stored tokens at most, 4 with patches of 4: capacities, work and forecast follow."""
    small, large = (Data.open(tiny(model__patch=patch), (2,)) for patch in (2, 4))
    assert (small.shapes[0][0].max_seqlen, large.shapes[0][0].max_seqlen) == (16, 4)
    assert large.shapes[0][-1].tokens <= small.shapes[0][-1].tokens / 3
    assert small.plan.hash == large.plan.hash
    sizes = [large.plan.manifests[0].size[s.row, s.view].astype(int) // 2 for s in map(large.plan.step, range(20))]
    mean = sum(int(size.prod(-1).sum()) for size in sizes) / 240
    found = data_statistics(tiny(model__patch=4), large, 2)
    assert found["mean_tokens"] == pytest.approx(mean) and found["capacities"] == [s.tokens for s in large.shapes[0]]


def test_a_preset_is_as_large_as_its_stored_latents_whatever_the_patch(tiny):
    """Both views and flips of 2 bytes a number, 4 times the channels a stored token."""
    tokens = int(open_preset("preset:imagenet256").size.astype(int).prod(-1).sum())
    for model, channels in (({}, 4), ({"model__patch": 8}, 4), ({"model__latent_channels": 16}, 16)):
        config = tiny(data__url="preset:imagenet256", model__classes=1000, **model)
        stored = storage_report(config, 1, 1, Data.open(config, (1,)))["dataset"]
        assert stored["bytes"] == tokens * 4 * channels * 2 * 2


def segment(images: list[int], weights: list[float] | None = None) -> tuple[int, ...]:
    config = SimpleNamespace(
        data=SimpleNamespace(weights=weights, urls=["big", "small"]), batch=SimpleNamespace(images=9)
    )
    return _segment(config, [SimpleNamespace(sample_id=range(count)) for count in images]).weights


@pytest.mark.parametrize(
    "images,weights,shares",
    [
        ([100_000_000, 40], None, (999_999_600_000, 400_000)),  # 40 of 100,000,040, in units of 1e-12
        ([10, 10], [3_000_000.0, 1.0], (999_999_666_667, 333_333)),
        ([10, 10], [2_000_001.0, 1.0], (999_999_500_000, 500_000)),
        ([10, 10], [1_999_998.0, 1.0], (999_999, 1)),  # rounds to a millionth: as it always was
        ([10, 10], [1.0, 3.0], (250_000, 750_000)),
        ([10, 30], None, (250_000, 750_000)),
        ([10, 30], [1.0, 0.0], (1_000_000, 0)),  # nothing is asked for
        ([10, 0], None, (1_000_000, 0)),
    ],
)
def test_no_share_rounds_to_nothing(images, weights, shares):
    assert segment(images, weights) == shares


@pytest.mark.parametrize(
    "weights,said",
    [
        ([1.0, 1e-13], "data.weights give small less than one image of 1,000,000,000,000, so it is never read"),
        ([1e308, 1e308], "so it is never read"),  # their sum is infinite
        ([-1.0, -1.0], r"data.weights are \[-1.0, -1.0\]: give one for each of the 2 datasets, none below 0"),
        ([1.0], "give one for each of the 2 datasets"),
        ([0.0, 0.0], "not all 0"),
        ([], "give one for each"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, said):
    with pytest.raises(UserError, match=said):
        segment([10, 10], weights)


def test_more_epochs_than_random_numbers_are_refused_at_the_start(tiny, dataset, capfd):
    """An epoch is 20 steps, and there are 2**24 epochs."""
    last = 20 * (1 << 24)
    said = f"train.steps={last} with 12 images a step are more than 16,777,216 epochs of the 240 images of {dataset}"
    with pytest.raises(UserError, match=said):
        Data.open(tiny(train__steps=last), (1,))
    data = Data.open(tiny(train__steps=last - 2000), (1,))
    assert data.plan.step(last - 2000).epoch.max() == (1 << 24) - 100  # 2,000 steps are 100 epochs before the end
    config = tiny(train__steps=last)
    with pytest.raises(UserError, match="train.steps=6 with 12 images"):  # what was trained before counts
        data.continued(Cursor(data.plan.hash, 0, [[0, 12, [1_000_000]]], [0], 0, [240 * (1 << 24)]), 1, tiny())
    for command in (train, partial(forecast, nodes=1, gpus_per_node=1, assumptions=Assumptions())):
        with pytest.raises(UserError, match=said):
            command(config)
    assert not Path(config.run).exists()


def test_a_small_dataset_with_a_large_weight_runs_out_of_epochs_first(tiny, dataset):
    changes = {"data__url": [dataset, dataset], "data__weights": [1.0, 3.0]}
    with pytest.raises(UserError, match="more than 16,777,216 epochs of the 240 images"):
        Data.open(tiny(train__steps=27 * (1 << 24), **changes), (1,))  # 80 / 3 steps are an epoch of the second
    assert Data.open(tiny(train__steps=26 * (1 << 24), **changes), (1,))


def test_a_table_of_positions_for_another_square_is_said(tiny):
    """The longest images have 16 tokens; in patches of 4 the same have 4."""
    assert (
        Data.open(config := tiny(model__position="sincos", model__sincos={"train_side": 4}), (1,)).notes(config) == []
    )
    (note,) = Data.open(config := tiny(model__position="sincos"), (1,)).notes(config)
    assert note.startswith("model.sincos.train_side is 16, and the longest image has 16 tokens:")
    assert note.endswith("of the data it is model.sincos.train_side=4")
    assert Data.open(tiny(), (1,)).notes(tiny()) == []
