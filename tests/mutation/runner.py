"""Makes a change in a copy of the tree and runs tests there until one fails."""

import gc
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.repository import ROOT

CPU_SECONDS = 60.0  # of the tests of one mutant: what no test has noticed by then, none notices
TEST_SECONDS = 20.0  # of CPU, of one test: no test of these needs as much by far, so that one that does spins
WALL_SECONDS = 600.0  # on a busy machine; a mutant that waits this long hangs
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+\.py\b.*?)(?: - .*)?$", re.MULTILINE)  # log lines begin so, too
_OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not long and not services and not gpu")
_OURS = ("tests", "data_sharding", "fitv2_scale", "launchers")
_OTHERS = (
    *("numpy", "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor"),
    *("hypothesis", "scipy.stats", "pydantic", "yaml", "xxhash", "PIL.Image", "safetensors.torch"),
    *("fsspec", "s3fs", "mlflow", "tqdm", "_pytest.assertion.rewrite", "_pytest.fixtures"),
)
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Outcome:
    """``killed`` by a test that failed, ``hangs`` until the end of patience, ``survived`` all tests or all the CPU time
    they may take (``all_ran`` says which), ``broken``: no test ran at all."""

    status: str
    by: str = ""  # the test that failed
    cpu_seconds: float = 0.0
    all_ran: bool = True


class NoSpinning:
    """A plugin of pytest: a test that computes without end fails. The suite's own limit of wall time does the same, but
    takes longer than a mutant has."""

    def __init__(self, cpu_seconds: float):
        self._cpu_seconds = cpu_seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        def late(*_: object) -> None:
            pytest.fail(f"spins: {self._cpu_seconds} s of CPU")

        signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_PROF, self._cpu_seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


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


def preload() -> None:
    """Imports, once for all mutants, what tests import of other packages: most of a short test's time. Nothing of the
    product, and nothing that computes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _OTHERS:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()


def run_tests(tree: Path, tests: list[str], cpu_seconds: float = CPU_SECONDS) -> Outcome:
    """Runs ``tests`` in ``tree`` until one fails or their time is up, in a fork that has the other packages loaded."""
    # A process that a test put into a session of its own may still write there.
    with tempfile.TemporaryDirectory(prefix="mutation-run-", ignore_cleanup_errors=True) as scratch:
        output = Path(scratch, "output")
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            os._exit(_pytest_in_child(tree, tests, Path(scratch), output))
        code, used = _watch(child, cpu_seconds)
        text = output.read_text(errors="replace") if output.exists() else ""
    if code is None:
        return Outcome("survived" if used >= cpu_seconds else "hangs", "", used, all_ran=False)
    if code == 0:
        return Outcome("survived", "", used)
    failed = _FAILED.search(text)
    if failed is None and code in (4, 5):  # pytest's for wrong arguments and for no tests
        return Outcome("broken", text[-400:], used)
    return Outcome("killed", failed[1] if failed else f"pytest ended with {code}", used)


def _pytest_in_child(tree: Path, tests: list[str], scratch: Path, output: Path) -> int:
    """Becomes a process that was never in the checkout: the leader of a session of its own, in ``tree``."""
    try:
        os.setsid()
        os.nice(3)
        os.chdir(tree)
        file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        os.environ |= {"PYTHONPATH": str(tree), "TMPDIR": str(scratch)}
        tempfile.tempdir = None
        sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
        for name in [name for name in sys.modules if name.split(".")[0] in _OURS]:
            del sys.modules[name]
        importlib.invalidate_caches()
        options = [*_OPTIONS, "--basetemp", f"{scratch}/pytest"]
        return int(pytest.main([*options, *tests], plugins=[NoSpinning(TEST_SECONDS)]))
    except BaseException:
        traceback.print_exc()
        return 3


def _watch(child: int, cpu_seconds: float) -> tuple[int | None, float]:
    """The exit code of the session that ``child`` leads, None if its time was up, and the CPU seconds that it took.
    None of its processes is left afterwards."""
    end, used, code = time.monotonic() + WALL_SECONDS, 0.0, None
    while used < cpu_seconds and time.monotonic() < end:
        time.sleep(0.5)
        used = max(used, _cpu_seconds(child))
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            break
    for pid in _session(child):
        _kill(pid)
    if code is None:
        os.waitpid(child, 0)
    return code, used


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
