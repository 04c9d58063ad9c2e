"""A small real dataset, and the smallest config that trains on it."""

from functools import partial
from pathlib import Path

import pytest

from fitv2_scale.config.load import parse_config
from fitv2_scale.config.schema import Config
from tests.support.ranks import run_ranks

IMAGES, CLASSES = 240, 5
# Overrides of configs/demo.yaml for `fitv2 bench`: as small a network, images of a preset's sizes.
BENCHED = ["model.depth=2", "model.hidden=32", "model.heads=2", "model.classes=1000", "layout.precision=fp32"]
BENCHED += ["data.url=preset:imagenet256", "batch.images=5", "layout.max_tokens=512"]


def make_pictures(root: Path, count: int, sides: tuple[int, int] = (32, 120)) -> None:
    """So many pictures of 5 classes and many sizes, in a folder a class; ``sides`` are pixels."""
    from tests.support.pictures import write_pictures

    write_pictures(root, count, sides, [f"class{i}" for i in range(CLASSES)])


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """240 pictures of 5 classes and many sizes, up to 16 tokens each, in several shards and frames."""
    from data_sharding.write.images import write_dataset

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


@pytest.fixture(scope="session")
def two_step_run(dataset, tmp_path_factory) -> str:
    """The folder of a run with a commit at step 2, for tests that only read it. Its EMA is nearly its weights."""
    from fitv2_scale.train.loop import train

    config = make_tiny(dataset, tmp_path_factory.mktemp("two_step"), train__steps=2, ema__decay=0.1)
    assert run_ranks(2, train, config) == [0, 0]
    return config.run
