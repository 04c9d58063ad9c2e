"""A process that does for tracking what rank 0 does, without training: journal, commits and the uploader.

    python -m tests.support.simulated_trainer RUN URI START UNTIL KEYS end|hang

It measures KEYS curves every 50 steps, commits every 1,000, and prints what recording costs a step, and a record, at
p99 in µs: most steps have none. One that hangs goes 500 steps further, commits none of them, and waits to be killed.
"""

import subprocess
import sys
import time
from pathlib import Path

from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.uploader_process import Uploader
from tests.support.repository import ROOT
from tests.support.waiting import wait

WINDOW, COMMIT = 50, 1000


def values(attempt: int, step: int, keys: int) -> dict[str, float]:
    """The curves at ``step``; all tell which attempt measured them."""
    named = {"loss": attempt + 1 / step, "grad_norm": attempt + 0.5, "lr": 1e-4, "images_per_second": 200.0}
    return named | {f"bucket/{i:02d}": attempt + i / step for i in range(keys - len(named))}


def main(run_url: str, uri: str, start: int, until: int, keys: int, hang: bool) -> None:
    run = Run.open(run_url)
    attempt = run.claim({})
    journal = Journal(attempt.folder, attempt.number, start)
    uploader = Uploader(run_url, uri, "test")
    costs = []
    for step in range(start + 1, until + 1 + 10 * WINDOW * hang):
        if step % WINDOW == 0:
            numbers = values(attempt.number, step, keys)
            began = time.perf_counter()
            journal.metrics(step, numbers)
            uploader.check()
            costs.append(time.perf_counter() - began)
        if step % COMMIT == 0:
            journal.seal()
            attempt.commit(step, f"steps/{step}", "sha256:00")
    while hang:
        journal.metrics(0, {})  # the last second's lines are flushed by those behind them
        uploader.check()
        time.sleep(0.1)
    attempt.end(0, "done")
    costs.sort(reverse=True)
    print(costs[(until - start) // 100] * 1e6, costs[len(costs) // 100] * 1e6)


def start_trainer(run: Path, uri: str, start: int, until: int, keys: int, then: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.support.simulated_trainer", str(run), uri]
    command += [str(start), str(until), str(keys), then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def uploader_of(trainer: subprocess.Popen) -> int:
    """The process id of its only child, waited for."""
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children")
    found = wait("the uploader", lambda: children.read_text().split() or trainer.poll() is not None)
    assert found is not True, f"the trainer has ended with {trainer.returncode}"
    return int(found[0])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6] == "hang")
