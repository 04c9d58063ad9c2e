"""That the time of planning is that of a window."""

import time

from data_sharding.plan.plan import Plan
from fitv2_scale.bench.scale_dealing import measure_dealing


def test_planning_is_a_window_by_its_steps(monkeypatch):
    """By a clock that counts windows: one is planned, after those of opening."""
    windows, planned = [], Plan._compute_window

    def plan_window(plan: Plan, segment: int, window: int):
        windows.append(window)
        return planned(plan, segment, window)

    monkeypatch.setattr(Plan, "_compute_window", plan_window)
    monkeypatch.setattr(time, "thread_time", lambda: float(len(windows)))
    rows = measure_dealing(2)
    assert rows["planning, a window at once", "CPU ms a step"] == 1000 / 256
    assert windows.count(1) == 1
