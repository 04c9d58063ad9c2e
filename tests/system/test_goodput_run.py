"""What `fitv2 plan` says of goodput, against real processes that are really killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from fitv2_scale.planning.forecast.goodput import DAY, Schedule, expected_goodput
from fitv2_scale.planning.forecast.simulate import simulate_runs
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.tracking.journal import read
from tests.support.rank_processes import ranks_of_config

EVERY, LOGGED = 100, 10  # steps


def start(config, file: Path) -> subprocess.Popen:
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "fitv2_scale.cli", "train", str(file), "--supervise", "--processes", "1"]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def begun(config, file: Path) -> tuple[subprocess.Popen, float]:
    """The supervisor, and when its first rank appeared: a restart does not start the supervisor again."""
    process = start(config, file)
    while not ranks_of_config(file):
        assert process.poll() is None
        time.sleep(0.02)
    return process, time.time()


def trained_seconds(run: str, batch: int) -> float:
    """Of the steps that count, saves left out."""
    return sum(LOGGED * batch / r.metrics["images_per_second"] for r in read(Run.open(run)) if r.metrics)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_forecast_of_a_run_with_kills(tiny, tmp_path):
    """A rank is killed again and again, at random; a run before it, undisturbed, says what start and steps take.

    So few failures come more or less often than their rate says: held against the bound is a forecast that knows when
    they came, by the same simulation; the formula's, which does not, is printed beside it.
    """

    def config(name: str, steps: int):
        return tiny(name, train__steps=steps, train__log_every=LOGGED, train__audit=False,
                    checkpoint__every_steps=EVERY, slurm__fruitless=100)  # fmt: skip

    calm = config("calm", 1500)
    process, began = begun(calm, tmp_path / "calm.yaml")
    assert process.wait(600) == 0
    batch = calm.batch.images
    a_step = trained_seconds(calm.run, batch) / 1500
    first = next(r.time_ms for r in read(Run.open(calm.run)) if r.metrics)
    restart = first / 1000 - LOGGED * a_step - began  # not the run's own end, which a killed attempt never comes to
    stall = 0.02  # of a save, so small here that it does not matter
    schedule = Schedule(EVERY * a_step, stall, 2 * stall, detect=0.2, restart=restart)
    between_failures = max(15.0, 3 * schedule.restart)
    steps = round(4 * between_failures / a_step / EVERY) * EVERY
    formula = expected_goodput(schedule, DAY / between_failures)

    harsh, file, rng, gaps = config("harsh", steps), tmp_path / "harsh.yaml", np.random.default_rng(0), []
    process, began = begun(harsh, file)
    seen: set[int] = set()
    while process.poll() is None:
        fresh = set(ranks_of_config(file).values()) - seen
        if not fresh:
            time.sleep(0.05)
            continue
        seen |= fresh
        gaps.append(float(rng.exponential(between_failures)))
        until = time.monotonic() + gaps[-1]
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(fresh.pop(), signal.SIGKILL)
    wall = time.time() - began
    assert process.returncode == 0
    measured = trained_seconds(harsh.run, batch) / wall
    killed = len(status(Run.open(harsh.run))["attempts"]) - 1
    draws = iter([np.array([gap]) for gap in gaps])
    seconds, _ = simulate_runs(schedule, steps * a_step, 1, lambda n: next(draws, np.array([np.inf])))
    forecast = steps * a_step / float(seconds[0])
    print(
        f"{killed} kills in {wall:.0f} s: goodput {measured:.3f}, forecast {forecast:.3f}, by the formula "
        f"{formula:.3f}; a start takes {schedule.restart:.1f} s, a step {1000 * a_step:.2f} ms"
    )
    assert killed >= 3
    assert measured == pytest.approx(forecast, abs=0.05)
