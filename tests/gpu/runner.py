"""Runs the jobs of a part one after the other, each for a limited time, whatever becomes of those before it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tests.gpu.jobs import Job
from tests.gpu.results import merge, read, write
from tests.support.repository import ROOT

_WORTH_IT = 1 / 3  # of a job's time: with less left it is not begun


def run(jobs: Sequence[Job], folder: Path, seconds: float) -> bool:
    """Runs ``jobs`` for ``seconds`` altogether and adds their results to those in ``folder``, after each of them.
    Whether all went well. What they print goes to log.txt there."""
    ends, all_well = time.monotonic() + seconds, True
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        for job in jobs:
            room = ends - time.monotonic()
            if room < job.seconds * _WORTH_IT:
                outcome = {"status": "left out", "seconds": 0.0, "result": None}
            else:
                outcome = _run(job, min(room, job.seconds), log)
            print(f"{job.name}: {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
            write(folder, merge(read(folder), {job.name: outcome | {"command": " ".join(job.words)}}))
            all_well &= outcome["status"] == "ok"
    return all_well


def _run(job: Job, seconds: float, log: IO[str]) -> dict[str, Any]:
    log.write(f"\n== {job.name}: {' '.join(job.words)}\n")
    log.flush()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        printed, report = Path(scratch, "printed"), Path(scratch, "tests.xml")
        words = [sys.executable, *job.words, *([f"--junitxml={report}"] if job.is_pytest else [])]
        with printed.open("w") as output:
            process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=log, start_new_session=True)
            try:
                status = "ok" if process.wait(seconds) == 0 else f"failed with {process.returncode}"
            except subprocess.TimeoutExpired:
                status = "stopped"
            finally:
                with suppress(ProcessLookupError):  # what it started as well
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.write(printed.read_text())
        result = _tests(report) if job.is_pytest else _json(printed)
    if status == "ok" and result is None:
        status = "printed no JSON"
    return {"status": status, "seconds": time.monotonic() - began, "result": result}


def _json(file: Path) -> Any:
    with suppress(ValueError):
        return json.loads(file.read_text())
    return None


def _tests(report: Path) -> dict[str, Any] | None:
    """How many passed, and which did not."""
    if not report.exists():
        return None
    cases = {
        f"{c.get('classname')}::{c.get('name')}": {child.tag for child in c} for c in xml.parse(report).iter("testcase")
    }
    bad = {"failure", "error"}
    return {
        "passed": sum(not tags & (bad | {"skipped"}) for tags in cases.values()),
        "skipped": [name for name, tags in cases.items() if "skipped" in tags],
        "failed": [name for name, tags in cases.items() if tags & bad],
    }
