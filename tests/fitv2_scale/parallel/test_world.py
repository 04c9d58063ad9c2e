"""The groups of processes."""

from datetime import timedelta

import pytest
from torch.distributed import distributed_c10d

from fitv2_scale.parallel.world import join, set_group_timeouts


@pytest.mark.parametrize(
    "seconds,days", [(2 * 86_400.0, 2), (366 * 86_400.0, 365), (1e12 * 1800, 365), (1e300, 365), (float("inf"), 365)]
)
def test_any_timeout_is_one_that_torch_can_count(seconds, days):
    with join() as world:
        set_group_timeouts(seconds)
        groups = list(distributed_c10d._world.pg_map)
        found = {group._get_backend(world.device).options._timeout for group in groups}
    assert groups and found == {timedelta(days=days)}
