"""DDPM's schedule against exact fractions, Bayes' rule and published numbers."""

from fractions import Fraction
from math import log, sqrt

import pytest
import torch

from data_sharding.errors import UserError
from fitv2_scale.model.ddpm_schedule import DdpmSchedule


def exact_alpha_bar() -> list[Fraction]:
    """Of the 1000 levels, with beta_t = 1e-4 + t (0.02 - 1e-4) / 999."""
    found, product = [], Fraction(1)
    for t in range(1000):
        product *= 1 - (Fraction(1, 10000) + t * (Fraction(1, 50) - Fraction(1, 10000)) / 999)
        product = Fraction(round(product * 10**40), 10**40)  # otherwise the fractions get thousands of digits
        found.append(product)
    return found


def test_published_numbers():
    schedule = DdpmSchedule.of_training()
    assert schedule.t_K.tolist() == list(range(1000))
    assert schedule.beta_K[[0, 999]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-12)
    assert schedule.alpha_bar_K[[0, 500, 999]].tolist() == pytest.approx([0.9999, 0.0777967, 4.03583e-5], rel=1e-6)
    assert schedule.posterior_variance_K[0].item() == 0
    assert schedule.posterior_log_variance_K[:2].tolist() == pytest.approx([-9.816725, -9.816725], abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "levels"),
    [
        ("250", [round(Fraction(999 * i, 249)) for i in range(250)]),
        ("3", [0, 500, 999]),  # 499.5 to the even one
        ("ddim50", list(range(0, 1000, 20))),
        ("ddim3", [0, 334, 668]),
        ("1000", list(range(1000))),
    ],
)
def test_levels_left_out(steps, levels):
    schedule, exact = DdpmSchedule.respaced(steps), exact_alpha_bar()
    kept, before = [exact[t] for t in levels], [Fraction(1), *(exact[t] for t in levels[:-1])]
    assert schedule.t_K.tolist() == levels and schedule.t_K.dtype == torch.int64
    assert schedule.alpha_bar_K.tolist() == pytest.approx([float(a) for a in kept], rel=1e-12)
    assert schedule.alpha_bar_before_K.tolist() == pytest.approx([float(a) for a in before], rel=1e-12)
    betas = [float(1 - a / b) for a, b in zip(kept, before, strict=True)]
    assert schedule.beta_K.tolist() == pytest.approx(betas, rel=1e-10)
    if steps == "250":
        assert levels[:3] + levels[-2:] == [0, 4, 8, 995, 999]


@pytest.mark.parametrize("schedule", [DdpmSchedule.of_training(), DdpmSchedule.respaced("250")], ids=["all", "250"])
def test_the_posterior_is_that_of_bayes(schedule):
    """The prior x_before ~ N(sqrt(before) x0, 1 - before) times the likelihood x_t ~ N(sqrt(1 - beta) x_before, beta):
    precisions add up, and so do precisions times means."""
    for k in range(1, len(schedule.t_K)):
        beta, before = schedule.beta_K[k].item(), schedule.alpha_bar_before_K[k].item()
        variance = 1 / (1 / (1 - before) + (1 - beta) / beta)
        of_x0, of_xt = variance * sqrt(before) / (1 - before), variance * sqrt(1 - beta) / beta
        assert schedule.posterior_variance_K[k].item() == pytest.approx(variance, rel=1e-9)
        assert schedule.posterior_log_variance_K[k].item() == pytest.approx(log(variance), rel=1e-9)
        assert schedule.posterior_x0_K[k].item() == pytest.approx(of_x0, rel=1e-9)
        assert schedule.posterior_xt_K[k].item() == pytest.approx(of_xt, rel=1e-9)
    assert [schedule.posterior_x0_K[0].item(), schedule.posterior_xt_K[0].item()] == pytest.approx([1, 0], abs=1e-12)


@pytest.mark.parametrize("steps", ["", "1", "1001", "ddim", "ddim1", "ddim700", "-5", "25.0", "250,10"])
def test_steps_that_are_none_are_refused_in_one_sentence(steps):
    with pytest.raises(UserError, match=f"^steps '{steps}': .*give "):
        DdpmSchedule.respaced(steps)
