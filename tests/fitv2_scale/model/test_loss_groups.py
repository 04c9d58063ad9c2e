"""The loss by time and by length: against sums by hand, the audits and the plan."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_sharding.plan.pack_layout import PackShape, lay_out
from data_sharding.write.images import write_dataset
from fitv2_scale.data import Data
from fitv2_scale.model.loss_groups import GROUPS, group_sums, loss_by_group
from fitv2_scale.model.objective import ImageLosses
from fitv2_scale.model.packed_batch import PackedBatch
from fitv2_scale.model.to_torch import packing_to_torch
from fitv2_scale.train.loop import DONE, train
from tests.support.ranks import run_ranks
from tests.support.run_history import metrics, trained


def group_of(t: float, tokens: int) -> tuple[str, str]:
    edge = next((e for e in (64, 128, 256, 512, 1024) if tokens <= e), None)
    return f"loss_t{int(4 * t)}", f"loss_tokens_le{edge}" if edge else "loss_tokens_gt1024"


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_min=True, exclude_max=True, width=32),
            st.sampled_from([1, 63, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 2000]),
            st.floats(0, 4, width=32),
        ),
        max_size=8,
    )
)
def test_a_pack_is_divided_by_time_and_by_length(images):
    shape = PackShape(sum(tokens for _, tokens, _ in images) + 3, len(images) + 2, 2000)
    layout = lay_out([(1, tokens) for _, tokens, _ in images], shape)
    weight_I = torch.zeros(shape.images)
    t_I, loss_I = torch.full((shape.images,), 0.5), torch.full((shape.images,), 9.0)  # at padding
    for i, (t, _, loss) in enumerate(images):
        weight_I[i], t_I[i], loss_I[i] = 1 / 8, t, loss
    zeros = torch.zeros(shape.images, dtype=torch.int64)
    batch = PackedBatch(torch.zeros(0), packing_to_torch(layout), zeros, weight_I, zeros, zeros)
    sums = dict(zip(GROUPS, group_sums(ImageLosses(loss_I, t_I), batch).double().T.tolist(), strict=True))
    expected = {name: [0.0, 0.0] for name in GROUPS}
    for t, tokens, loss in images:
        for name in ("loss", *group_of(t, tokens)):
            expected[name] = [expected[name][0] + loss / 8, expected[name][1] + 1 / 8]
    for name in GROUPS:
        assert sums[name] == pytest.approx(expected[name], rel=1e-6), name


def test_a_group_without_images_has_no_loss():
    sums = np.zeros((2, len(GROUPS)))
    sums[:, 0], sums[:, 2], sums[:, 3] = (2.0, 4.0), (0.5, 1.0), (1.5, 3.0)
    assert loss_by_group(sums) == {"loss_t1": 0.5, "loss_t2": 0.5}


def test_groups_make_up_the_loss(tiny):
    """Weighted by how many images the audits say each had; the same on two ranks and with several packs."""
    changes = {"train__steps": 6, "train__log_every": 3, "checkpoint__every_steps": 3}
    one, many = tiny("one", **changes), tiny("many", **changes, layout__max_tokens=64)
    assert run_ranks(1, train, one) == [DONE]
    assert run_ranks(2, train, many) == [DONE] * 2
    found, other = metrics(one.run), metrics(many.run)
    for last in (3, 6):
        for name in (n for n in found[last] if n.startswith("loss")):
            assert other[last][name] == pytest.approx(found[last][name], rel=1e-6), name
        images = [image for step in range(last - 3, last) for image in trained(one.run)[step]]
        times = [np.array([int(bits, 16)], np.uint32).view(np.float32).item() for _, _, bits, *_ in images]
        shares = np.bincount([int(4 * t) for t in times], minlength=4) / len(images)
        made_up = sum(share * found[last][f"loss_t{k}"] for k, share in enumerate(shares))
        assert made_up == pytest.approx(found[last]["loss"], rel=1e-6)
        assert found[last]["loss_tokens_le64"] == pytest.approx(found[last]["loss"], rel=1e-6)


def test_resolutions_in_one_batch_are_told_apart(tiny, dataset, tmp_path):
    """Images of up to 16 tokens and of 70 to 100, one to two."""
    for i in range(24):
        noise = np.random.default_rng(i).integers(0, 255, (130 + i, 160, 3), np.uint8)
        (tmp_path / f"large/class{i % 5}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(tmp_path / f"large/class{i % 5}/{i}.png")
    large = str(tmp_path / "set")
    write_dataset(str(tmp_path / "large"), large, max_tokens=100, workers=1, progress=False)
    config = tiny(data__url=[dataset, large], data__weights=[1.0, 2.0], train__steps=4, train__log_every=4)
    assert run_ranks(2, train, config) == [DONE] * 2
    found, plan = metrics(config.run)[4], Data.open(config, (1,)).plan
    lengths = np.concatenate([plan.step(step).tokens for step in range(4)])
    assert 0.3 < (share := (lengths <= 64).mean()) < 0.37 and lengths[lengths > 64].min() > 64
    small, large_ = found["loss_tokens_le64"], found["loss_tokens_le128"]
    assert share * small + (1 - share) * large_ == pytest.approx(found["loss"], rel=1e-6)
    assert abs(small - large_) > 0.01
