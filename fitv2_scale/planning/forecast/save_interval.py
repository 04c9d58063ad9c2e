"""How often to commit: between the time that saving costs and the work that a failure costs."""

import math

SHORTEST, LONGEST = 60.0, 1800.0  # seconds; below, logs and storage fill up; above, a person waits too long


def mtbf_hours(nodes: int, failures_per_node_day: float) -> float:
    """Mean time between failures of a job on ``nodes`` nodes that fail independently. No failures: infinity."""
    rate = nodes * failures_per_node_day
    return 24 / rate if rate else math.inf


def recommended_interval(save_seconds: float, mtbf_hours: float, durable_seconds: float = 0.0) -> float:
    """Seconds between commits that lose the least time, clamped to [SHORTEST, LONGEST].

    ``save_seconds`` is how long a save keeps training waiting; ``durable_seconds``, how long until it counts, if that
    goes on in the background: commits are never closer than this.

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
