"""`fitv2 bench data --against`: compares this project's loader with others on the same latents.

In a run one loader reads epoch after epoch in a process of its own (``measure_loader``). A round runs each loader once,
and rounds are repeated, so that other work of the machine affects all loaders alike: ratios within a round are more
reliable than rates. Rates count what reaches the consumer: images, and their latents as float16 without padding.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.filesystems import file_system
from data_sharding.worker_pool import cores
from fitv2_scale.bench.latents import MAX_TOKENS, PRESET, drop_from_page_cache, upload, write_latents
from fitv2_scale.bench.loaders import OURS, PEERS, LoaderConfig, missing_package
from fitv2_scale.bench.workload import BATCH

ALL = "all"
# A rank of FiTv2-3B/2 on one H100 at 46 % of its peak, the best published value for dense models of this size.
GPU_RANKS, GPU_RATE = 8, 114.0  # ranks of a node; images/s of each
_TOKEN_BYTES = 16 * 2  # latents in float16
_LIMIT = 900  # seconds per run


def choose_loaders(against: Sequence[str]) -> tuple[list[str], list[str]]:
    """The loaders to measure, this project's first, and a sentence for each that is left out.

    Raises:
        UserError: a loader that was asked for by name is unknown, or not installed.
    """
    wanted = list(PEERS) if ALL in against else list(dict.fromkeys(against))
    unknown = [name for name in wanted if name not in PEERS]
    if unknown:
        raise UserError(f"there is no loader '{unknown[0]}' to compare with: choose {', '.join(PEERS)} or {ALL}")
    lacking = {name: package for name in wanted if (package := missing_package(name))}
    remedy = "pip install -e '.[peers]'"
    for name, package in lacking.items():
        if name in against:
            raise UserError(f"{name} cannot be measured, {package} is not installed: {remedy}")
    left_out = [f"{name} is left out, {package} is not installed: {remedy}" for name, package in lacking.items()]
    return [OURS, *(name for name in wanted if name not in lacking)], left_out


def measure(
    against: Sequence[str], images: int, repeats: int, seconds: float, folder: str | None = None, s3: str | None = None
) -> dict[str, Any]:
    """All figures of one comparison.

    ``folder`` keeps the latents that are written for it; ``s3`` is an s3:// prefix to read from instead of the local
    disk; it is cleared afterwards.
    """
    loaders, left_out = choose_loaders(against)
    if images < BATCH or images % BATCH:
        raise UserError(f"--images is {images}: give a multiple of {BATCH}, the number of images of a step")
    with _folder(folder) as root, _stored_latents(root, s3, images, loaders) as url:
        runs = []
        for repeat in range(repeats):
            for loader in loaders:
                drop_from_page_cache(root / loader)
                made = _run_process("measure_loader", f"{url}/{loader}", loader=loader, seconds=seconds)
                runs.append({"way": loader, "repeat": repeat, **made})
        return {
            "data": f"{images} images of {PRESET}",
            "storage": "s3" if s3 else "local disk",
            "cores": cores(),
            "batch": BATCH,
            "repeats": repeats,
            "loaders": [_summary(loader, runs) for loader in loaders],
            "rank": _run_process("loading_overhead", f"{url}/{OURS}", ranks=GPU_RANKS, rate=GPU_RATE),
            "left_out": left_out,
            "runs": runs,
        }


def to_text(report: dict[str, Any]) -> str:
    lines = [
        f"{report['data']}, {report['storage']}, {report['cores']} cores, medians of {report['repeats']} rounds "
        "(least - most)",
        "",
        f"{'loader':<12}{'first epoch, images/s':>28}{'later epochs, images/s':>28}{'MB/s':>8}{'CPU ms/image':>14}"
        f"{'fitv2 is faster by':>24}",
    ]
    for row in report["loaders"]:
        cold, warm = row["cold_images_per_second"], row["warm_images_per_second"]
        ratios = [f"{row[part]['median']:.1f}x" for part in ("cold_ratio", "warm_ratio")]
        lines.append(
            f"{row['loader']:<12}{_spread(cold):>28}{_spread(warm):>28}{row['warm_mb_per_second']['median']:>8.0f}"
            f"{1000 * row['cpu_seconds_per_image']['median']:>14.3f}"
            f"{'' if row['loader'] == OURS else ', '.join(ratios):>24}"
        )
    rank = report["rank"]
    lines += [
        "",
        f"one of {rank['ranks']} ranks, {rank['images_per_step']} images per step of {rank['step_seconds']:.2f} s: its "
        f"loader uses {rank['cpu_share']:.1%} of a core, and steps wait {rank['wait_share']:.1%} of their time for it",
    ]
    return "\n".join([*lines, *report["left_out"]])


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['median']:,.0f} ({figure['least']:,.0f} - {figure['most']:,.0f})"


def _summary(loader: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    mine, ours = ([run for run in runs if run["way"] == name] for name in (loader, OURS))
    row: dict[str, Any] = {"loader": loader}
    for part in ("cold", "warm"):
        rates = [run[part]["images"] / run[part]["seconds"] for run in mine]
        row[f"{part}_images_per_second"] = _figure(rates)
        row[f"{part}_mb_per_second"] = _figure(
            [run[part]["tokens"] * _TOKEN_BYTES / 1e6 / run[part]["seconds"] for run in mine]
        )
        our_rates = [run[part]["images"] / run[part]["seconds"] for run in ours]
        row[f"{part}_ratio"] = _figure([a / b for a, b in zip(our_rates, rates, strict=True)])
    row["cpu_seconds_per_image"] = _figure(
        [run["cpu_seconds"] / (run["cold"]["images"] + run["warm"]["images"]) for run in mine]
    )
    return row


def _figure(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def _run_process(module: str, url: str, **options: Any) -> dict[str, Any]:
    """The report of this package's ``module``, run in a new process."""
    with tempfile.TemporaryDirectory() as scratch:
        config = LoaderConfig(url, scratch, BATCH, cores(), "mixed", MAX_TOKENS)
        arguments = json.dumps({"config": asdict(config), **options})
        command = [sys.executable, "-m", f"fitv2_scale.bench.{module}", arguments]
        # One torch thread per process, since there are as many workers as cores.
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=_LIMIT
        )
    if done.returncode:
        # One that was killed, as where memory runs out, has said nothing.
        said = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
        raise UserError(f"{url} cannot be measured: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def _folder(folder: str | None) -> Generator[Path]:
    if folder:
        yield Path(folder).absolute()
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@contextmanager
def _stored_latents(root: Path, s3: str | None, images: int, loaders: list[str]) -> Generator[str]:
    """Writes the latents, a folder for each loader, and gives their URL: ``root`` itself, or ``s3``."""
    write_latents(root, images, loaders)
    if not s3:
        yield str(root)
        return
    if not s3.startswith("s3://"):
        raise UserError(f"--s3 {s3}: give a bucket and an unused prefix, for example s3://BUCKET/bench")
    url = s3.rstrip("/")
    fs, path = file_system(url)
    if fs.exists(path):
        raise UserError(f"{url} exists already: give a prefix under which nothing is stored")
    try:
        for loader in loaders:
            upload(root / loader, f"{url}/{loader}")
        yield url
    finally:
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)
