"""A disk that is full costs saves, and nothing else."""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import DONE, RETRY, train
from tests.support.checkpoint_state import opened, recover, saver
from tests.support.commits import commit_bytes
from tests.support.ranks import run_ranks


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Takes all space but ``leave`` bytes."""
    ballast, free = folder / "ballast", os.statvfs(folder)
    with open(ballast, "wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return ballast


def saves_on_a_full_disk(folder: str, leave: int) -> list:
    with opened({}, f"{folder}/run") as (world, run):
        save, said = saver(world, run, rows=100), []
        said.append(save(1))
        ballast = world.run_on_rank0(lambda: fill(Path(folder), leave))
        said += [save(2), save(3)]
        world.run_on_rank0(ballast.unlink)
        return [*said, save(4)]


@pytest.mark.parametrize("leave", [0, 4096, 100_000, 400_000])
def test_a_full_disk_costs_saves_and_nothing_else(small_disk, leave):
    """480 kB a save: the space ends before, in the first or in the second rank's file."""
    first, second = run_ranks(2, saves_on_a_full_disk, str(small_disk), leave)
    assert first == second and first[0] is None and first[3] is None
    assert all("No space left on device" in said for said in first[1:3])
    assert len(list((small_disk / "run" / "steps").iterdir())) == 2  # what the failed ones had taken is free again
    ((found,),) = run_ranks(1, partial(recover, rows=100), {}, str(small_disk / "run"))
    assert found["step"] == 4 and not found["problems"] and found["commits"] == [1, 4]


def train_on_a_full_disk(config, folder: str, full: tuple[int, int]) -> int:
    """The disk is full from the save after step ``full[0]`` until that after ``full[1]``."""
    from fitv2_scale.train.session import Session

    save = Session.save

    def act(self, step, start, last, accounting):
        if step in full and start:
            failed = self._finish_save()  # of the save before, which met the disk as it was
            self.world.run_on_rank0(lambda: fill(Path(folder), 0) and None if step == full[0] else ballast.unlink())
            return save(self, step, start, last, accounting) or failed
        return save(self, step, start, last, accounting)

    ballast = Path(folder, "ballast")
    Session.save = act
    return train(config)


def test_training_continues_while_the_disk_is_full(tiny, small_disk):
    undisturbed = tiny("undisturbed", train__steps=12)
    assert run_ranks(2, train, undisturbed) == [DONE, DONE]
    changes = {"train__steps": 12, "checkpoint__every_steps": 2, "train__audit": False}
    config = tiny("run", run=str(small_disk / "run"), **changes)
    assert run_ranks(2, train_on_a_full_disk, config, str(small_disk), (4, 8)) == [DONE, DONE]
    assert commit_bytes(config.run) == commit_bytes(undisturbed.run)
    from fitv2_scale.tracking.journal import read

    records = [(r.step, r.metrics) for r in read(Run.open(config.run))]
    assert [s for s, m in records if "loss" in m] == list(range(1, 13))  # the journal waited for its disk
    assert [(s, m["failed_saves"]) for s, m in records if "failed_saves" in m] == [(4, 1), (6, 2)]

    # Full for good: three saves are tried, then another attempt is asked for, on another node perhaps.
    shutil.rmtree(config.run)  # the disk has room for one run
    config = tiny("run", run=str(small_disk / "other"), **changes)
    assert run_ranks(2, train_on_a_full_disk, config, str(small_disk), (4, 99)) == [RETRY, RETRY]
    Path(small_disk, "ballast").unlink()
    assert run_ranks(2, train, config) == [DONE, DONE]
    assert commit_bytes(config.run) == commit_bytes(undisturbed.run)
    assert [a["last_step"] for a in status(Run.open(config.run))["attempts"]] == [2, 12]
