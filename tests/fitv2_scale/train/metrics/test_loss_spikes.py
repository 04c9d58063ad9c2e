"""Loss spikes are found, told of and counted; noise, slopes and new levels are none."""

import numpy as np
import pytest

import fitv2_scale.train.loop as module
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read
from fitv2_scale.train.loop import DONE, train
from fitv2_scale.train.metrics.loss_spikes import SpikeDetector
from fitv2_scale.train.progress_bar import ProgressBar
from tests.support.ranks import run_ranks

SPIKE = 40  # counted from 0


def spikes(losses, sigmas: float = 6.0) -> dict[int, float]:
    detector = SpikeDetector(sigmas)
    distances = {i: detector.distance(float(x)) for i, x in enumerate(losses)}
    return {i: d for i, d in distances.items() if d is not None}


def noise(n: int, seed: int = 0) -> np.ndarray:
    return 1 + 0.1 * np.random.default_rng(seed).standard_normal(n)


def test_noise_and_a_falling_loss_are_no_spikes():
    assert all(spikes(noise(5000, seed)) == {} for seed in range(5))
    assert spikes(noise(5000) * np.exp(-np.arange(5000) / 700)) == {}
    assert spikes(np.ones(500)) == {}


def test_a_spike_is_measured_in_deviations():
    losses = noise(1000)
    losses[700] = 2.5
    weights = 0.99 ** np.arange(700)[::-1]  # the closed form of a memory of a hundred steps; the start has faded away
    mean = np.average(losses[:700], weights=weights)
    deviation = np.sqrt(np.average((losses[:700] - mean) ** 2, weights=weights))
    assert spikes(losses) == {700: pytest.approx((2.5 - mean) / deviation, rel=0.01)}


def test_a_burst_does_not_hide_itself_and_a_new_level_is_accepted():
    burst = noise(1000)
    burst[[700, 702, 704, 706]] = 5.0
    assert list(spikes(burst)) == [700, 702, 704, 706]
    level = noise(2000)
    level[1000:] += 1.5
    found = list(spikes(level))
    assert found[0] == 1000 and found[-1] < 1100


@pytest.mark.parametrize("sigma", [6.0, 0.0])
def test_a_run_tells_of_its_spikes(tiny, sigma):
    config = tiny(train__steps=SPIKE + 5, train__log_every=4, train__spike_sigma=sigma, checkpoint__every_steps=100)
    codes, said = zip(*run_ranks(2, train_with_a_spike, config), strict=True)
    assert codes == (DONE, DONE)
    told = [line for line in said[0] if line.startswith("loss spike: ")]
    metrics = {r.step: r.metrics for r in read(Run.open(config.run)) if r.metrics}
    if sigma:
        assert len(told) == 1 and f"at step {SPIKE + 1}, " in told[0]
        assert {step for step, m in metrics.items() if m["loss_spikes"]} == {44}
    else:
        assert told == [] and all("loss_spikes" not in m for m in metrics.values())


def train_with_a_spike(config) -> tuple[int, list[str]]:
    train_step, said, say = module.train_step, [], ProgressBar.say

    def step(engine, batch, *rest):
        loss, result = train_step(engine, batch, *rest)
        return loss * (100 if batch.step == SPIKE else 1), result

    def listen(progress, text):
        said.append(text)
        say(progress, text)

    module.train_step, ProgressBar.say = step, listen
    return train(config), said
