"""Eight ranks in a storm: data late on some, a frame lost, a signal to one, an error on one. They still agree."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import fitv2_scale.train.loop as module
from data_sharding.format.manifest import Manifest
from data_sharding.stream.loader import Loader
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import BUG, DONE, RETRY, train
from tests.support.ranks import run_ranks
from tests.support.run_history import losses, trained
from tests.support.tiny_runs import make_tiny

STEPS, SIGNALLED, FAILING = 24, 5, 6


@pytest.fixture
def damaged(dataset, tmp_path) -> str:
    """Without one of its five frames."""
    copy = tmp_path / "damaged"
    shutil.copytree(dataset, copy)
    (copy / Manifest.load(dataset).shards[-1].name).unlink()
    return str(copy)


def in_a_storm(config, signal_at: int | None = None, fail_at: int | None = None) -> int:
    """Trains. In half of the cases a rank says that the next step's data are not there yet, and they come late in some.
    One rank gets a signal before it takes the step ``signal_at``; the loader of one fails at ``fail_at``."""
    rank = int(os.environ["RANK"])
    rng, is_ready, following, take = random.Random(rank), Loader.is_ready, Loader.__next__, module.train_step

    def late(loader: Loader, seconds: float) -> bool:
        if seconds == 0 and rng.random() < 0.5:
            return False
        time.sleep(rng.uniform(0, 0.03) if rng.random() < 0.3 else 0)
        return is_ready(loader, seconds)

    def failing(loader: Loader):
        batch = following(loader)
        if rank == FAILING and batch.step == fail_at:
            raise ZeroDivisionError("planned")
        return batch

    def signalled(engine, batch, *rest):
        if rank == SIGNALLED and batch.step == signal_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return take(engine, batch, *rest)

    Loader.is_ready, Loader.__next__, module.train_step = late, failing, signalled
    return train(config)


def taken(run: str, attempt: int) -> list[list[int]]:
    """The steps that each rank took in an attempt."""
    files = sorted(Path(run, f"attempts/{attempt}/audit").glob("rank-*.jsonl"))
    return [[json.loads(line)["step"] for line in file.read_text().splitlines()] for file in files]


def test_a_storm_changes_nothing(damaged, tmp_path):
    """Stopped by a signal to one rank and continued: images, times and substitutes are those of one calm rank."""
    changes = {"data__max_substituted": 0.2, "train__steps": STEPS, "seed": 4, "checkpoint__every_steps": 5}
    calm, stormy = (make_tiny(damaged, tmp_path, name, **changes) for name in ("calm", "stormy"))
    assert run_ranks(1, train, calm) == [DONE]
    assert run_ranks(8, in_a_storm, stormy, 9) == [RETRY] * 8
    steps = taken(stormy.run, 1)
    assert len(steps) == 8 and all(one == steps[0] for one in steps) and 10 <= len(steps[0]) <= 11
    assert status(Run.open(stormy.run))["last_commit"]["step"] == len(steps[0])  # none that was taken is lost
    assert run_ranks(8, in_a_storm, stormy) == [DONE] * 8
    assert trained(stormy.run) == trained(calm.run)
    assert losses(stormy.run) == pytest.approx(losses(calm.run), rel=1e-5)
    substituted = [json.loads(Path(c.run, "ledger/00000001.json").read_text())["frames"] for c in (calm, stormy)]
    assert substituted[0] == substituted[1] and not Path(stormy.run, "ledger/00000002.json").exists()


@pytest.mark.parametrize("step", [3, 10])
def test_what_one_of_eight_meets_all_hear(tiny, step):
    config = tiny(train__steps=STEPS, checkpoint__every_steps=1000)
    with pytest.raises(ZeroDivisionError, match="planned"):
        run_ranks(8, in_a_storm, config, None, step)
    end = json.loads(Path(config.run, "attempts/1/end.json").read_text())
    assert end["code"] == BUG and f"rank {FAILING} on " in end["reason"] and "planned" in end["reason"]
    assert all(one == list(range(step)) for one in taken(config.run, 1))
