"""A small real dataset, and the smallest config that trains on it; and the fixtures of other rooms."""

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.services.s3 import client, rgw  # noqa: F401 - fixtures
from tests.support.mlflow_queries import folder, runs  # noqa: F401 - fixtures
from tests.support.published_latents import whole  # noqa: F401 - fixture
from tests.support.run_locations import place  # noqa: F401 - fixture
from tests.support.samples import stored  # noqa: F401 - fixture
from tests.support.slurm_jobs import cluster, fitv2, job_config, slurm  # noqa: F401 - fixtures
from tests.support.tiny_runs import dataset, tiny  # noqa: F401 - fixtures
from tests.support.written_datasets import images, written  # noqa: F401 - fixtures

# The same examples on every machine, however slow it is; --hypothesis-profile=default looks for others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

_S3 = (
    "fitv2_scale/bench/test_checkpoint.py",
    "fitv2_scale/checkpoint/test_s3_faults.py",
    "system/test_checkpoint_kills.py",
    "fitv2_scale/run/test_run_s3.py",
    "data_sharding/stream/test_loader_s3.py",
    "data_sharding/storage/test_s3_datasets.py",
    "data_sharding/storage/test_store.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Where two processes share the tests, a file's tests stay in one of them, and so do all files that use the same
    server, which then is started once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0].removeprefix("tests/")
            return "s3" if file in _S3 else "slurm" if "slurm" in file else file

    return ByServer(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with servers wait the most, so they begin first."""
    items.sort(key=lambda item: item.get_closest_marker("services") is None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Torch's numbers do not depend on which tests ran before."""
    torch.manual_seed(0)
