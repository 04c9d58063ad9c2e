"""Tasks on several processes, which report their progress and never outlive their parent; and the division of tasks
among the tasks of a Slurm job."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, TypeVar, cast

from data_sharding.errors import UserError
from data_sharding.launched import launched

if TYPE_CHECKING:  # a codec imports this module, and shows no bar
    from tqdm import tqdm

Task = TypeVar("Task")
Progress = Callable[..., object]  # called with what a task reports, such as (more images, whether made here)

WORKER = "FITV2_WORKER"  # in the environment of a process of the pool: its number, from 0


def run_tasks(tasks: list[Task], work: Callable[[Task, Progress], None], workers: int, progress: Progress) -> None:
    """Calls ``work(task, progress)`` for each task, in order, on ``workers`` processes; with one, in this process.

    ``work`` must be importable by name. Raises the first exception of a task, its traceback in a note, or UserError if
    a process was killed.
    """
    if workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    if workers == 1:
        for task in tasks:
            work(task, progress)
        return
    context = multiprocessing.get_context("spawn")  # a forked child of a process with network threads can hang
    waiting = tasks[::-1]
    processes, busy = [], []
    try:
        for number in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, number), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            busy.append(ours)
        while busy:
            for pipe in cast(list[Connection], wait(busy)):  # some of these; typeshed admits sockets, too
                try:
                    message = pipe.recv()
                    if message == "ready" and waiting:
                        pipe.send(waiting.pop())
                    elif message == "ready":
                        busy.remove(pipe)
                except (EOFError, ConnectionError) as error:
                    raise UserError(
                        "a worker process was killed, probably because memory ran out: run the same command again with "
                        "fewer --workers; it continues where it stopped"
                    ) from error
                if isinstance(message, tuple):
                    progress(*message)
                elif isinstance(message, Exception):
                    raise message
    finally:
        for process in processes:
            process.terminate()  # idle after success; after an error, what they wrote is whole: `put` is atomic
            process.join()


def slurm_task() -> tuple[int, int]:
    """(index, count) of this process among those that srun, mpirun or torchrun has started; (0, 1) for a single one.

    In a batch script Slurm's count is that of the job, though one process runs alone: it does its part first, then that
    of the others.
    """
    if (task := launched(os.environ)) is not None:
        return task.rank, task.size
    count = int(os.environ.get("SLURM_NTASKS", 1))
    return int(os.environ.get("SLURM_PROCID", 0)) % count, count


def order_for_slurm_task(tasks: list) -> list:
    """All tasks, in the order in which this Slurm task should do them: its own, then those of the others from their
    far ends."""
    index, count = slurm_task()
    others = ((index + i) % count for i in range(1, count))
    return tasks[index::count] + [task for other in others for task in tasks[other::count][::-1]]


def progress_bar(total: int, done: int, show: bool, unit: str, **options) -> "tqdm":
    """Amount, speed and time left: a bar in a terminal, else a line about every 10 s, for log files."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        line = "{n_fmt}/{total_fmt}" + f"{unit}, " + "{rate_noinv_fmt}, {remaining} left\n"
        options |= {"mininterval": 10, "bar_format": line}
    return tqdm(total=total, initial=done, unit=unit, disable=not show, **options)


def cores() -> int:
    """CPU cores that this process may use: a Slurm job may not have all of the machine's."""
    return len(os.sched_getaffinity(0))


def _serve(pipe: Connection, work: Callable, number: int) -> None:
    """A worker process: sends "ready" to get a task, tuples that a task reports, or the exception that ended one.

    It exits when its pipe is closed, so it never outlives its parent, however that ends.
    """
    os.environ[WORKER] = str(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it the pipe
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # from the parent: what is half written is removed on the way
    try:
        while True:
            pipe.send("ready")
            task = pipe.recv()
            try:
                work(task, lambda *report: pipe.send(report))
            except Exception as error:
                error.add_note(traceback.format_exc())
                pipe.send(error)
    except (EOFError, ConnectionError):
        return
