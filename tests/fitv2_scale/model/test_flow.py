"""Rectified flow: both ends, the velocity by finite difference, the weight of each image, who draws what."""

import numpy as np
import pytest
import torch

from data_sharding.rng import Purpose
from fitv2_scale.config.model import FlowConfig
from fitv2_scale.model.flow import Flow, sample_t
from fitv2_scale.model.noise import noise_words
from fitv2_scale.model.objective import image_means, pack_loss
from fitv2_scale.model.packed_batch import PackedBatch
from tests.support.tiny_networks import TINY, build, pack

SIZES = [(3, 4), (2, 2), (4, 4)]


def batch(order=(0, 1, 2), tokens=40, slots=7) -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    latents = [torch.randn(h * w, 16, generator=generator) for h, w in SIZES]
    used = sum(len(latents[i]) for i in order)

    def per_image(values):
        return torch.tensor([values[i] for i in order] + [0] * (slots - len(order)))

    return PackedBatch(
        latents_TC=torch.cat([latents[i] for i in order] + [torch.zeros(tokens - used, 16)]),
        packing=pack([SIZES[i] for i in order], tokens, slots, 16),
        label_I=per_image([1, 4, 2]),
        weight_I=per_image([1 / 3, 1 / 3, 1 / 3]).float(),
        sample_id_I=per_image([10, 20, 30]),
        epoch_I=per_image([0, 0, 1]),
    )


def test_t0_is_noise_t1_is_data_and_the_target_is_the_velocity(monkeypatch):
    made = {}
    for t in (0.0, 1.0, 0.25, 0.25 + 1e-3):
        monkeypatch.setattr("fitv2_scale.model.flow.sample_t", lambda *a, t=t: torch.full((7,), t, dtype=torch.float32))
        made[t] = Flow(FlowConfig(), 5, seed=0).training_batch(batch())
    x1 = batch().latents_TC
    torch.testing.assert_close(made[1.0].x_TC, x1)
    torch.testing.assert_close(made[0.0].x_TC, x1 - made[0.0].target_TC)  # x0
    assert made[0.0].x_TC[:12].std() == pytest.approx(1, rel=0.1)
    slope = (made[0.25 + 1e-3].x_TC - made[0.25].x_TC) / 1e-3
    torch.testing.assert_close(slope, made[0.25].target_TC, rtol=1e-3, atol=2e-3)


def test_the_mean_of_an_image_is_over_its_tokens():
    torch.manual_seed(0)
    b, values = batch(), torch.rand(40, 16)
    losses = image_means(values, b)
    ends = np.cumsum([0] + [h * w for h, w in SIZES])
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        assert losses[i].item() == pytest.approx(values[start:end].double().mean().item(), rel=1e-6)
    assert losses[4:].tolist() == [0, 0, 0]  # slots without tokens


def test_every_image_weighs_the_same_and_padding_nothing():
    """The pack's loss is (1/B) sum of image losses, for any order, padding or split into packs."""
    network, flow = build(TINY), Flow(FlowConfig(label_dropout=0.5), 5, seed=1)
    whole = pack_loss(flow, network, batch())
    for order, tokens, slots in (((2, 0, 1), 33, 5), ((1, 2, 0), 64, 8)):
        other = pack_loss(flow, network, batch(order, tokens, slots))
        assert other.item() == pytest.approx(whole.item(), rel=1e-6)
    parts = sum(pack_loss(flow, network, batch((i,), 16, 3)).item() for i in range(3))
    assert parts == pytest.approx(whole.item(), rel=1e-6)
    empty = pack_loss(flow, network, batch((), 16, 3))
    empty.backward()
    assert empty.item() == 0 and all(not p.grad.any() for p in network.parameters() if p.grad is not None)


def test_times_follow_their_densities():
    from scipy import stats

    ids, epoch = torch.arange(20000), torch.zeros(20000, dtype=torch.int64)
    t = sample_t("logit_normal", 0, epoch, ids).double().numpy()
    assert stats.kstest(np.log(t / (1 - t)), "norm").pvalue > 1e-4
    assert stats.kstest(sample_t("uniform", 0, epoch, ids).numpy(), "uniform").pvalue > 1e-4
    dropped = Flow(FlowConfig(label_dropout=1.0), 5, 0).training_batch(batch()).label_I
    assert dropped.tolist() == [5] * 7
    assert Flow(FlowConfig(label_dropout=0.0), 5, 0).training_batch(batch()).label_I.tolist()[:3] == [1, 4, 2]


def test_noise_is_keyed_by_image_epoch_and_place_alone():
    place = torch.arange(12)

    def noise(epoch, image):
        return noise_words(Purpose.NOISE, 0, torch.full((12,), epoch), torch.full((12,), image), place, 16)

    assert torch.equal(noise(0, 10), noise(0, 10))
    assert not torch.equal(noise(1, 10), noise(0, 10)) and not torch.equal(noise(0, 11), noise(0, 10))
    # Value 16 * place + channel of one stream: token 5 alone gives the same integers as within the image.
    alone = noise_words(Purpose.NOISE, 0, torch.tensor([0]), torch.tensor([10]), torch.tensor([5]), 16)
    assert torch.equal(alone[0], noise(0, 10)[5])
    # Of a larger patch, 64 * place + channel: the same stream, in longer pieces.
    longer = noise_words(Purpose.NOISE, 0, torch.tensor([0]), torch.tensor([10]), torch.tensor([1]), 64)
    assert torch.equal(longer[0], noise(0, 10)[4:8].flatten())


def test_the_second_half_of_an_output_is_left_out():
    """As SiT does with the half that DiT's network has for the variance."""
    flow, pack_ = Flow(FlowConfig(), 5, seed=1), batch()
    output_TC = torch.randn(40, 32, requires_grad=True)
    noised = flow.training_batch(pack_)
    first, both = (flow.losses(lambda *given, o=o: o, noised, pack_) for o in (output_TC[:, :16], output_TC))
    assert torch.equal(both.loss_I, first.loss_I) and torch.equal(both.time_I, noised.t_I)
    both.weighted_sum(pack_).backward()
    assert output_TC.grad is not None and output_TC.grad[:, :16].any() and not output_TC.grad[:, 16:].any()


def test_validation_is_at_the_times_that_are_asked_for():
    u_I = torch.tensor([0.125, 0.5, 0.875, 0.3, 0.3, 0.3, 0.3], dtype=torch.float64)
    noised = Flow(FlowConfig(), 5, seed=1).validation_batch(batch(), u_I)
    assert torch.equal(noised.t_I, u_I.float()) and noised.label_I.tolist() == batch().label_I.tolist()
