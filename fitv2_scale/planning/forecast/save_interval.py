"""How often to save: a balance between the cost of saving and the work that a failure destroys."""

import math

SHORTEST, LONGEST = 60.0, 1800.0  # seconds; shorter fills logs and storage, longer makes a person wait


def mtbf_hours(nodes: int, failures_per_node_day: float) -> float:
    """Mean time between failures of a job on ``nodes`` nodes that fail independently. No failures: infinity."""
    rate = nodes * failures_per_node_day
    return 24 / rate if rate else math.inf


def recommended_interval(save_seconds: float, mtbf_hours: float, durable_seconds: float = 0.0) -> float:
    """Seconds between commits that lose the least time, clamped to [SHORTEST, LONGEST].

    ``save_seconds`` is the time for which training waits for a save; ``durable_seconds`` the time until a save in the
    background is durable: commits are never closer together than this.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps (2006), eq. 37; its first
    term is J. W. Young's (1974).
    """
    w, m = save_seconds, 3600 * mtbf_hours
    if math.isinf(m):
        best = LONGEST
    elif w >= 2 * m:
        best = m
    else:
        x = w / (2 * m)
        best = math.sqrt(2 * w * m) * (1 + math.sqrt(x) / 3 + x / 9) - w
    return max(min(max(best, SHORTEST), LONGEST), durable_seconds)
