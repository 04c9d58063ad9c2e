"""USR1 and TERM, whatever a rank is doing when they come: all ranks save together, and nothing that was done is lost.

Each rank of two gets each signal at each of five moments: twenty attempts. Jobs on a real Slurm are in test_slurm.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import DONE, RETRY, train
from tests.support.commits import commit_bytes
from tests.support.ranks import run_ranks
from tests.support.run_history import audited, losses, trained
from tests.support.tiny_runs import make_tiny

BEGUN, WHOLE = 4, 30  # steps
PICTURES = {"sampling__every_steps": 7, "sampling__sizes": ["32x32"], "sampling__columns": 2, "sampling__steps": 2}


@pytest.fixture(scope="module")
def begun(dataset, tmp_path_factory):
    """A run of four steps that continues from its commit, and one of thirty that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("signals")
    for name, steps in (("begun", BEGUN), ("undisturbed", WHOLE)):
        assert run_ranks(2, train, make_tiny(dataset, folder, name, train__steps=steps, **PICTURES)) == [DONE] * 2
    return folder


def train_until_told(config, moment: str, number: int, rank: int) -> int:
    """Trains; rank ``rank`` gets the signal when it is in the middle of ``moment``."""
    if os.environ["RANK"] == str(rank):
        tell_in_the_middle(moment, number, Path(config.run, "told"))
    return train(config)


def tell_in_the_middle(moment: str, number: int, told: Path) -> None:
    import fitv2_scale.checkpoint.checkpointer as checkpointer
    import fitv2_scale.train.in_loop_eval as evaluation
    import fitv2_scale.train.setup as setup
    import fitv2_scale.train.step as step
    from fitv2_scale.train.coordination import Coordination

    place, name = {
        "loading": (setup, "restore"),
        "first batch": (Coordination, "_load"),
        "a step": (step, "poison_if_not_finite"),
        "evaluation": (evaluation, "sample"),
        "a save": (checkpointer, "write_commit"),
    }[moment]
    real, calls = getattr(place, name), 0

    def act(*args, **kw):
        nonlocal calls
        calls += 1
        if calls == (6 if moment == "a step" else 1):
            os.kill(os.getpid(), number)
            told.touch()
            time.sleep(0.3)  # it is noted meanwhile
        return real(*args, **kw)

    setattr(place, name, act)


@pytest.mark.parametrize("moment", ["loading", "first batch", "a step", "evaluation", "a save"])
def test_all_that_was_done_is_durable(begun, dataset, tmp_path, moment):
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for rank in (0, 1):
            name = f"{number.name}-{rank}"
            shutil.copytree(begun / "begun", tmp_path / name)
            config = make_tiny(dataset, tmp_path, name, train__steps=100_000, **PICTURES)
            assert run_ranks(2, train_until_told, config, moment, number, rank) == [RETRY, RETRY]
            assert Path(config.run, "told").exists()
            attempt, commit = status(Run.open(config.run))["attempts"][-1], Run.open(config.run).log.commits()[-1]
            done = audited(config.run, attempt["attempt"])
            assert attempt["why"] == f"{number.name}: saved at step {commit.fields['step']}"
            assert done == list(range(BEGUN, commit.fields["step"])) and len(done) < 20
            if moment == "evaluation":  # what comes behind it may be the end of the job
                assert done[-1] == 6 and not Path(config.run, "samples/00000007.png").exists()
    goes_on = make_tiny(dataset, tmp_path, name, train__steps=WHOLE, **PICTURES)
    assert run_ranks(2, train, goes_on) == [DONE] * 2
    undisturbed = str(begun / "undisturbed")
    assert commit_bytes(goes_on.run) == commit_bytes(undisturbed)
    assert trained(goes_on.run) == trained(undisturbed) and losses(goes_on.run) == losses(undisturbed)
