"""Where fixtures come from, and which tests share a process."""

import multiprocessing
import os
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from fitv2_scale.run.stop_signals import STOP_SIGNALS
from tests.support.repository import ROOT

# They import at start what every machine has: the rest only in the fixtures that need it, so that the GPU tests run on
# a machine that has little more than torch.
pytest_plugins = (
    # servers
    "tests.services.mlflow_server",
    "tests.services.s3",
    "tests.services.slurm",
    # datasets
    "tests.support.published_latents",
    "tests.support.samples",
    "tests.support.small_vae",
    "tests.support.written_datasets",
    "tests.support.loaders",
    # runs
    "tests.support.evaluations",
    "tests.support.run_locations",
    "tests.support.slurm_jobs",
    "tests.support.tiny_runs",
)

# The same examples on every machine, however slow it is; --hypothesis-profile=default looks for others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def for_the_gpu(config: pytest.Config) -> bool:
    """Whether GPU tests alone are asked for: ``-m gpu``, or ``-m "gpu and …"``."""
    return config.option.markexpr.split(" and ")[0].strip() == "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Only GPU tests see a GPU: the others start up to six ranks, on gloo. Processes that tests start inherit the
    variable, and torch reads it no sooner than the first of them asks for CUDA."""
    if not for_the_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Under nohup it is ignored, also by what tests start and then hang up on.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For GPU tests, only the files that have some are imported: others need packages that the machine may not have."""
    if for_the_gpu(config) and collection_path.name.startswith("test_") and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text() or None
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and pytest -m gpu")


@pytest.fixture(autouse=True)
def signals_as_before():
    """`fitv2 train` holds back the signals that ask to save, and ignores them in the end, until its process ends, which
    here is the tests' own."""
    before, handlers = signal.pthread_sigmask(signal.SIG_BLOCK, ()), {s: signal.getsignal(s) for s in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test():
    """Python waits at its end for all processes that it has started: one that hangs would hold up the whole run."""
    before = multiprocessing.active_children()
    yield
    for process in multiprocessing.active_children():
        if process not in before:
            process.kill()
            process.join()


SERVERS = {"rgw": "s3", "cluster": "slurm", "mlflow_server": "mlflow"}  # markers, by the fixture that starts the server


@cache
def process_of(file: str) -> str:
    """Which tests run in one process, where several share them: a file's, and those of all files in which a server's
    marker stands, so that a server is started once. Jobs report to MLflow, so those two go together."""
    source = (ROOT / file).read_text()
    marker = next((name for name in SERVERS.values() if f"mark.{name}" in source), file)
    return "slurm" if marker == "mlflow" else marker


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """xdist's own --dist loadgroup finds no group with pytest 9.2: https://github.com/pytest-dev/pytest-xdist/issues/1386.
    A scheduler knows names of tests alone, not their markers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return process_of(nodeid.partition("::")[0])

    return ByServer(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with servers wait the most, so they begin first."""
    for item in items:
        markers = {mark.name for mark in item.iter_markers()} & set(SERVERS.values())
        for fixture, marker in SERVERS.items():
            if fixture in item.fixturenames and marker not in markers:
                raise pytest.UsageError(f"{item.nodeid} uses the fixture {fixture}: mark it {marker}")
        if markers:
            item.add_marker("services")
    items.sort(key=lambda item: item.get_closest_marker("services") is None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Torch's numbers do not depend on which tests ran before."""
    torch.manual_seed(0)
