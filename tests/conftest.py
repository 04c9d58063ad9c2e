"""A small real dataset, and the smallest config that trains on it; and the fixtures of other rooms."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from data_sharding.write.images import write_dataset
from fitv2_scale.config.load import parse_config
from fitv2_scale.config.schema import Config
from tests.services.s3 import client, rgw  # noqa: F401 - fixtures
from tests.support.mlflow_queries import folder, runs  # noqa: F401 - fixtures
from tests.support.published_latents import whole  # noqa: F401 - fixture
from tests.support.run_locations import place  # noqa: F401 - fixture
from tests.support.samples import stored  # noqa: F401 - fixture
from tests.support.slurm_jobs import cluster, fitv2, job_config, slurm  # noqa: F401 - fixtures
from tests.support.written_datasets import images, written  # noqa: F401 - fixtures

# The same examples on every machine, however slow it is; --hypothesis-profile=default looks for others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

IMAGES, CLASSES = 240, 5
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


def make_pictures(root: Path, count: int) -> None:
    """So many pictures of 5 classes and many sizes, in a folder a class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = rng.integers(32, 120, 2)
        ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * rng.uniform(0.2, 2, 3)
        file = root / f"class{i % CLASSES}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((ramp + rng.integers(0, 40, ramp.shape)).astype(np.uint8)).save(file)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """240 pictures of 5 classes and many sizes, up to 16 tokens each, in several shards and frames."""
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root, IMAGES)
    url = str(tmp_path_factory.mktemp("data") / "set")
    write_dataset(str(root), url, max_tokens=16, workers=1, images_per_shard=50, progress=False)
    return url


def make_tiny(dataset: str, parent: Path, name: str = "run", **changes) -> Config:
    """A config that trains into parent/name, with changes as in ``train__steps=10``."""
    tree = {
        "run": str(parent / name),
        "model": {"depth": 2, "hidden": 32, "heads": 2, "classes": CLASSES},
        "data": {"url": dataset},
        "batch": {"images": 12},
        "optimizer": {"lr": 1e-3, "warmup_steps": 10},
        "ema": {"decay": 0.9},
        "train": {"steps": 6, "log_every": 1, "audit": True},
        "layout": {"precision": "fp32"},
        "checkpoint": {"every_steps": 5},
        "tracking": {"uri": "none"},
    }
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return parse_config(tree, "test")


@pytest.fixture
def tiny(dataset, tmp_path):
    """``tiny("name", train__steps=10)``: see make_tiny."""
    return partial(make_tiny, dataset, tmp_path)
