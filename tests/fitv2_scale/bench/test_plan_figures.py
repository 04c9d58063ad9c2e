"""What planning costs, on a dataset that is planned in no time."""

from functools import partial

from fitv2_scale.bench import plan_figures
from fitv2_scale.bench.plan_figures import measure, to_text


def test_planning_an_epoch_is_measured(monkeypatch):
    images = 12 * plan_figures.BATCH + 5
    monkeypatch.setattr(plan_figures, "open_preset", partial(plan_figures.open_preset, images=images))
    rows = measure(["planning"])["planning"]
    assert [(row["data"], row["steps"]) for row in rows] == [("preset:imagenet256", 12), ("preset:imagenet1024", 12)]
    assert all(0 < row["seconds"] < 60 for row in rows)
    # At least the window: of each image eight columns of 8 bytes.
    assert all(12 * plan_figures.BATCH * 8 * 8 < row["extra_bytes"] < 1e9 for row in rows)
    title, *lines = to_text({"planning": rows}).splitlines()
    assert title.split() == ["data", "planning", "an", "epoch", "extra", "memory"]
    assert [line.split()[0] for line in lines] == ["preset:imagenet256", "preset:imagenet1024"]
