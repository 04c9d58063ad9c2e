"""Tasks on several processes: each is done once, and what one raises is raised here."""

import os

import pytest

from data_sharding.errors import UserError
from data_sharding.worker_pool import WORKER, run_tasks, slurm_task


def work(task: int, progress) -> None:
    if task == 2:
        raise KeyError(f"task {task}")
    if task == 9:
        os._exit(1)
    progress(task, os.getpid(), os.environ.get(WORKER))


@pytest.mark.parametrize("workers", [1, 2])
def test_each_task_is_done_once(workers):
    done: list[tuple] = []
    run_tasks([0, 1, 3, 4], work, workers, lambda *told: done.append(told))
    assert sorted(task for task, *_ in done) == [0, 1, 3, 4]
    assert all((pid == os.getpid()) == (workers == 1) for _, pid, _ in done)
    assert {number for *_, number in done} <= ({"0", "1"} if workers == 2 else {None})


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_is_raised(workers):
    with pytest.raises(KeyError, match="task 2"):
        run_tasks([1, 2], work, workers, lambda *told: None)


def test_a_worker_that_dies_and_no_worker_are_told():
    with pytest.raises(UserError, match="a worker process was killed, .* fewer --workers"):
        run_tasks([9, 1], work, 2, lambda *told: None)
    with pytest.raises(UserError, match="workers must be at least 1, not 0"):
        run_tasks([1], work, 0, lambda *told: None)


def test_a_batch_script_does_its_own_part(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_STEPID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert slurm_task() == (0, 4)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert slurm_task() == (0, 4)
    monkeypatch.delenv("SLURM_NTASKS")
    assert slurm_task() == (0, 1)
