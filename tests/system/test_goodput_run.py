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
from tests.support.waiting import wait

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


def kill_next_rank(process: subprocess.Popen, file: Path, seconds: float) -> None:
    """Kills the rank that runs, or comes next, after so many seconds, if training is not over before."""
    while process.poll() is None and not (ranks := ranks_of_config(file)):
        time.sleep(0.05)
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    if process.poll() is None:
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)
            wait("it to be gone", lambda gone=pid: gone not in ranks_of_config(file).values())


@pytest.mark.services
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("calm_steps", [200, pytest.param(1500, marks=pytest.mark.long)])
def test_forecast_of_a_run_with_kills(tiny, tmp_path, calm_steps):
    """A rank is killed again and again, at random; a run before it, undisturbed, says what start and steps take.

    So few failures come more or less often than their rate says: held against the bound is a forecast that knows when
    they came, by the same simulation; the formula's, which does not, is printed beside it. The short suite's run is too
    short for a figure.
    """

    whole = calm_steps == 1500

    def config(name: str, steps: int):
        return tiny(name, train__steps=steps, train__log_every=LOGGED, train__audit=False,
                    checkpoint__every_steps=EVERY, slurm__fruitless=100)  # fmt: skip

    calm = config("calm", calm_steps)
    process, began = begun(calm, tmp_path / "calm.yaml")
    assert process.wait(600) == 0
    batch = calm.batch.images
    a_step = trained_seconds(calm.run, batch) / calm_steps
    first = next(r.time_ms for r in read(Run.open(calm.run)) if r.metrics)
    restart = first / 1000 - LOGGED * a_step - began  # not the run's own end, which a killed attempt never comes to
    stall = 0.02  # of a save, so small here that it does not matter
    schedule = Schedule(EVERY * a_step, stall, 2 * stall, detect=0.2, restart=restart)
    between_failures = max(15.0, 3 * schedule.restart)
    steps = round(4 * between_failures / a_step / EVERY) * EVERY if whole else 3 * calm_steps
    formula = expected_goodput(schedule, DAY / between_failures)

    harsh, file, rng, gaps = config("harsh", steps), tmp_path / "harsh.yaml", np.random.default_rng(0), []
    process, began = begun(harsh, file)
    while process.poll() is None:
        gap = float(rng.exponential(between_failures))
        half_way = schedule.restart + steps * a_step / 2  # of the short run, however slow its start is
        gaps.append(gap if whole else half_way if not gaps else np.inf)
        kill_next_rank(process, file, gaps[-1])
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
    assert killed >= (3 if whole else 1)
    assert measured == pytest.approx(forecast, abs=0.05 if whole else 0.9)
