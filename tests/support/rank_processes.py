"""The processes of ranks that a launcher has started, found among all those of the machine."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path


def ranks_of_config(config_file: Path) -> dict[int, int]:
    """Process id by rank of the trainers that were started with this config."""
    started = _environments(lambda words: str(config_file) in words and "--supervise" not in words)
    return {int(environment["RANK"]): pid for pid, environment in started if "RANK" in environment}


def ranks_of_job(job: str) -> dict[int, int]:
    """Process id by rank of a Slurm job that trains, or is about to."""
    expected = {"SLURM_CONF": os.environ["SLURM_CONF"], "SLURM_JOB_ID": job}
    started = _environments(lambda words: "fitv2_scale.cli.slurm_task" in words and not words[0].endswith("srun"))
    return {
        int(environment["SLURM_PROCID"]): pid
        for pid, environment in started
        if "SLURM_PROCID" in environment and expected.items() <= environment.items()
    }


def _environments(wanted: Callable[[list[str]], bool]) -> Iterator[tuple[int, dict[str, str]]]:
    """Process id and environment of each process whose command line is wanted."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted((process / "cmdline").read_text(errors="replace").split("\0")):
                variables = (process / "environ").read_text(errors="replace").split("\0")
                yield int(process.name), dict(v.split("=", 1) for v in variables if "=" in v)
