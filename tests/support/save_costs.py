"""What saves and failures cost, in closed form: what intervals and goodput are compared with."""

import math


def lost_share(interval: float, save_seconds: float, mtbf_hours: float, restart_seconds: float = 0.0) -> float:
    """The share of all time that saves, lost work and restarts take when committing every ``interval`` seconds.

    Exact for failures that come independently at a constant rate: Daly (2006), eq. 20.
    """
    m = 3600 * mtbf_hours
    if math.isinf(m):
        return save_seconds / (interval + save_seconds)
    spent = m * math.exp(restart_seconds / m) * math.expm1((interval + save_seconds) / m)
    return 1 - interval / spent
