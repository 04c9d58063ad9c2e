"""Makes a change in a copy of the tree and runs tests there until one fails."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CPU_SECONDS = 60.0  # of the tests of one mutant: what no test has noticed by then, none notices
WALL_SECONDS = 1800.0  # on a busy machine; a mutant that waits this long hangs
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not long and not services and not gpu")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Outcome:
    """``killed`` by a test that failed, ``hangs`` until the end of patience, ``survived`` all tests or all the CPU time
    they may take (``all_ran`` says which), ``broken``: no test ran at all."""

    status: str
    by: str = ""  # the test that failed
    cpu_seconds: float = 0.0
    all_ran: bool = True


@contextmanager
def copied_tree(root: Path) -> Iterator[Path]:
    """A temporary folder with all files of ``root`` that git knows or would add; never the checkout itself."""
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, text=True).splitlines()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in names:
            if (root / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, Path(folder) / name)
        yield Path(folder)


def run_changed(tree: Path, file: str, changed: str, tests: list[str]) -> Outcome:
    """The outcome of ``tests`` with ``changed`` as the text of ``file`` in ``tree``, which is as before afterwards."""
    path = tree / file
    before = path.read_text()
    _write(path, changed)
    try:
        return run_tests(tree, tests)
    finally:
        _write(path, before)


def _write(path: Path, text: str) -> None:
    """Also forgets the compiled form, which is told apart by whole seconds and size alone."""
    path.write_text(text)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def run_tests(tree: Path, tests: list[str]) -> Outcome:
    """Runs ``tests`` in ``tree`` until one fails or their time is up."""
    with tempfile.TemporaryDirectory(prefix="mutation-run-") as scratch:
        env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        command = [sys.executable, "-m", "pytest", *_OPTIONS, "--basetemp", f"{scratch}/pytest", *tests]
        with open(f"{scratch}/output", "w+") as output:
            process = subprocess.Popen(
                ["nice", *command], cwd=tree, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            used, in_time = _watch(process)
            output.seek(0)
            text = output.read()
    if not in_time:
        return Outcome("survived" if used >= CPU_SECONDS else "hangs", "", used, all_ran=False)
    if process.returncode == 0:
        return Outcome("survived", "", used)
    failed = _FAILED.search(text)
    if failed is None and process.returncode in (4, 5):  # pytest's for wrong arguments and for no tests
        return Outcome("broken", text[-400:], used)
    return Outcome("killed", failed[1] if failed else f"pytest ended with {process.returncode}", used)


def _watch(process: subprocess.Popen) -> tuple[float, bool]:
    """CPU seconds that the process and its children took, and whether it ended before its time was up. None of its
    session is left afterwards."""
    end, used = time.monotonic() + WALL_SECONDS, 0.0
    try:
        while True:
            try:
                process.wait(0.5)
                return used, True
            except subprocess.TimeoutExpired:
                used = max(used, _cpu_seconds(process.pid))
                if used >= CPU_SECONDS or time.monotonic() > end:
                    return used, False
    finally:
        for pid in _session(process.pid):
            _kill(pid)
        process.wait()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    """All processes of the session that ``leader`` began, and no other's."""
    return [int(stat[0]) for stat in _stats() if int(stat[5]) == leader]


def _cpu_seconds(leader: int) -> float:
    """That they and the children they have waited for took."""
    return sum(sum(map(int, stat[13:17])) for stat in _stats() if int(stat[5]) == leader) / _TICKS


def _stats() -> Iterator[list[str]]:
    """The fields of /proc/PID/stat of every process, with the name of its program left empty."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = file.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield [head.split(" ", 1)[0], "", *tail.split()]
