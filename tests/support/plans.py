"""Plans of datasets that have no files."""

from types import SimpleNamespace

import numpy as np

from data_sharding.plan.balance import Cost
from data_sharding.plan.plan import Plan, Segment
from data_sharding.plan.view_sizes import CROP

COST = Cost(linear=960, quadratic=1)


def manifest(samples: int, frames: int = 7, seed: int = 0, max_tokens: int = 64) -> SimpleNamespace:
    """The columns that the plan looks at: images of 1 .. max_tokens tokens, half of them with a crop view."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, samples), min(frames, samples) - 1, replace=False)) if samples > 1 else []
    size = np.zeros((samples, 2, 2), np.uint16)
    size[:, 0, 0], size[:, 0, 1] = 1, rng.integers(1, max_tokens + 1, samples)
    size[rng.random(samples) < 0.5, CROP] = (1, max_tokens)
    return SimpleNamespace(
        url="memory",
        digest=f"{samples}-{frames}-{seed}",
        header=SimpleNamespace(max_tokens=max_tokens),
        frame_first=np.array([0, *cuts, samples]),
        sample_id=rng.choice(1 << 20, samples, replace=False),
        label=np.arange(samples) % 10,
        size=size,
    )


def plan_of(m, seed: int, images: int, views: str = "mixed") -> Plan:
    return Plan([m], seed, views, [Segment(0, images, (1,))])
