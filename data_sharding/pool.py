"""Tasks on several processes that report how far they are, and that never outlive their parent."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from data_sharding.errors import UserError

Task = TypeVar("Task")
Progress = Callable[..., None]  # what a task reports as it goes on, such as (images more, whether made here)

WORKER = "FITV2_WORKER"  # in the environment of a process of the pool: its number, from 0


def run_tasks(tasks: list[Task], work: Callable[[Task, Progress], None], workers: int, progress: Progress) -> None:
    """Calls ``work(task, progress)`` for each task, in order, on ``workers`` processes; on one, in this process.

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
            for pipe in wait(busy):
                try:
                    message = pipe.recv()
                    if message == "ready" and waiting:
                        pipe.send(waiting.pop())
                    elif message == "ready":
                        busy.remove(pipe)
                except (EOFError, ConnectionError) as error:
                    raise UserError(
                        "a process was killed, most likely for want of memory: run the same command again, with fewer "
                        "--workers, it goes on where it was"
                    ) from error
                if isinstance(message, tuple):
                    progress(*message)
                elif isinstance(message, Exception):
                    raise message
    finally:
        for process in processes:
            process.terminate()  # after success they are idle; else what they wrote is whole, for `put` is atomic
            process.join()


def _serve(pipe: Connection, work: Callable, number: int) -> None:
    """A writing process: sends "ready" for a task, tuples of what it reports, or the exception that ended a task.

    It ends when its pipe does, so it does not outlive its parent, whatever ends that.
    """
    os.environ[WORKER] = str(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it the pipe
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
