"""What tests of writing datasets share: images, a dataset that nothing disturbed, and processes to kill."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.waiting import wait


def make_images(root: Path, count: int, side: int = 40) -> None:
    """``count`` small photographs' worth of noise and slopes, of varied shape, in three classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        h, w = rng.integers(side, 3 * side, 2)
        pixels = (np.linspace(0, 200, w)[None, :, None] + rng.integers(0, 56, (h, w, 3))).astype(np.uint8)
        folder = root / ("ant", "bee", "cow")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_images(root, 60)
    return str(root)


def bytes_of(root) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in Path(root).rglob("*") if f.is_file()}


OPTIONS = {"max_tokens": 16, "holdout": 0.1, "images_per_shard": 7, "progress": False}


@pytest.fixture(scope="session")
def written_dataset(image_folder, tmp_path_factory):
    from data_sharding.write.images import write_dataset

    dst = tmp_path_factory.mktemp("undisturbed") / "set"
    return dst, write_dataset(image_folder, str(dst), workers=1, **OPTIONS)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_when(seen: Callable[[], object], process: subprocess.Popen) -> list[int]:
    """Kills the process as soon as ``seen()``, while it runs; gives its workers, of which none is left."""
    wait("what is to be seen", lambda: seen() or process.poll() is not None)
    assert process.poll() is None
    workers = children(process.pid)
    process.kill()
    process.wait()
    wait("the workers to be gone", lambda: not any(running(pid) for pid in workers))
    return workers
