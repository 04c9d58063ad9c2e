"""How often a commit should be made, compared with a search and with simulated failures."""

import math

import pytest

from fitv2_scale.planning.forecast.save_interval import LONGEST, SHORTEST, mtbf_hours, recommended_interval
from tests.support.save_costs import lost_share


@pytest.mark.parametrize("save", [0.1, 1.0, 10.0, 120.0])
@pytest.mark.parametrize("mtbf", [0.05, 0.5, 5.0, 50.0])
def test_the_interval_is_the_best_one(save, mtbf):
    """Against a search over the exact cost: no interval in the allowed range loses noticeably less."""
    chosen = recommended_interval(save, mtbf)
    assert SHORTEST <= chosen <= LONGEST
    candidates = [SHORTEST * (LONGEST / SHORTEST) ** (i / 2000) for i in range(2001)]
    best = min(lost_share(t, save, mtbf) for t in candidates)
    assert lost_share(chosen, save, mtbf) <= best + 1e-3 * (1 - best)


def test_the_cost_is_that_of_many_simulated_failures():
    """Exponential failures drawn one by one, against the formula."""
    import numpy as np

    rng, interval, save, mtbf, restart = np.random.default_rng(0), 300.0, 20.0, 0.5, 60.0
    spent = useful = 0.0
    left = rng.exponential(3600 * mtbf)
    while useful < 3e6:
        if left >= interval + save:
            left -= interval + save
            spent, useful = spent + interval + save, useful + interval
            continue
        spent, left = spent + left, rng.exponential(3600 * mtbf)
        while left < restart:
            spent, left = spent + left, rng.exponential(3600 * mtbf)
        spent, left = spent + restart, left - restart
    assert lost_share(interval, save, mtbf, restart) == pytest.approx(1 - useful / spent, abs=0.01)


def test_the_ends_of_the_range():
    assert recommended_interval(1.0, math.inf) == LONGEST == recommended_interval(1.0, 1e6)
    assert recommended_interval(0.001, 0.1) == SHORTEST
    assert recommended_interval(1.0, 0.5, durable_seconds=400.0) == 400.0
    assert recommended_interval(1e5, 0.2) == 720.0  # saving takes longer than a failure is away
    assert mtbf_hours(16, 1.0) == 1.5 and mtbf_hours(4, 0.0) == math.inf
    assert lost_share(95.0, 5.0, math.inf) == pytest.approx(0.05)
