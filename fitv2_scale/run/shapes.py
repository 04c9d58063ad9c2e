"""The shapes of a run's JSON files, as far as this program uses them (samples are in ``run.py``)."""

from typing import Any

from data_sharding.storage.records import Count, Seconds, Shape, Time


class _Parent(Shape):
    run: str
    step: Count


class Identity(Shape):
    """run.json."""

    id: str
    created: Time
    config: dict[str, Any]
    recipe: dict[str, Any]
    recipe_hash: str
    plan_hash: str | None
    parent: _Parent | None
    classes: str | None = None


class _Gpu(Shape):
    name: str


class _Tracking(Shape):
    uri: str
    experiment: str


class Start(Shape):
    """start.json of an attempt."""

    time: Time | None = None
    hostname: str = ""
    pid: Count = 0
    git: str | None = None
    changed: list[str] = []
    gpus: list[_Gpu] = []
    parameters: Count | None = None
    datasets: list[str] = []
    validation: list[str] = []
    validation_grid: dict[str, Count] = {}
    codec: str | None = None
    init_from: str | None = None
    init_new: list[str] = []
    tracking: _Tracking | None = None


class Classes(Shape):
    """classes.json."""

    classes: str


class Quarantined(Shape):
    """A record in quarantine/."""

    problem: str


class Pace(Shape):
    """pace.json of an attempt."""

    step_seconds: Seconds
    save_seconds: Seconds


class End(Shape):
    """end.json of an attempt."""

    time: Time
    code: int
    reason: str
    lost: list[Count] = []
