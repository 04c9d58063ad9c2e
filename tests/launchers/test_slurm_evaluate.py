"""A suite as a Slurm job on a milestone of a run: its tasks share the images; a killed job is continued."""

import json
from pathlib import Path

import pytest

from fitv2_scale.train.loop import train
from tests.support.feature_networks import Tiny, save_network
from tests.support.ranks import run_ranks
from tests.support.slurm_jobs import wait_for_the_end
from tests.support.waiting import wait

pytestmark = pytest.mark.slurm

SUITE = """\
title: Small
images: IMAGES
sampling: {solver: euler, steps: 25, cfg: 1.5}
cells: [{size: 32x48}, {size: 64x16}]
published: [{model: Other, 32x48: [1, 2, 3, 0.5, 0.5]}]
"""


def kill_and_continue(slurm, submit, evaluations: Path) -> None:
    """The parts that the killed job has made are not made again."""
    submit()
    wait("a few parts", lambda: len(list(evaluations.glob("32x48*/part-*.npz"))) > 8)
    slurm.run("scancel", "--user=root", "--signal=KILL", "--full")
    wait_for_the_end(slurm)
    kept = {file: file.stat().st_mtime_ns for file in evaluations.glob("32x48*/part-*.npz")}
    assert len(kept) > 8 and not list(evaluations.glob("*.json"))

    submit()
    wait("the second cell", lambda: list(evaluations.glob("64x16*/part-*.npz")))
    there = {file: file.stat().st_mtime_ns for file in kept if file.exists()}
    assert there == kept


@pytest.mark.parametrize("images", [100, pytest.param(4000, marks=pytest.mark.long)])
def test_a_suite_as_a_job_that_is_killed_and_queued_again(
    slurm, fitv2, job_config, tiny, tmp_path, monkeypatch, images
):
    """The short suite's job is over too soon to be killed."""
    monkeypatch.chdir(tmp_path)
    config = tiny(train__steps=2, ema__decay=0.1, layout__max_tokens=256)
    assert run_ranks(1, train, config) == [0]
    network, digest = save_network(Tiny(), tmp_path)
    Path("suite.yaml").write_text(SUITE.replace("IMAGES", str(images)))
    command = ["evaluate", f"{config.run}@2", "--suite", "suite.yaml", "--network", network, "--network-sha256", digest]
    command += ["--reference", config.data.url]
    job = ["submit", job_config(), "--nodes", "2", f"slurm.folder={tmp_path}/jobs", "--", *command]
    evaluations = Path(config.run, "evaluations/2")

    if images == 4000:
        kill_and_continue(slurm, lambda: fitv2(*job), evaluations)
    else:
        fitv2(*job)
    wait_for_the_end(slurm)
    results = [json.loads(file.read_text()) for file in sorted(evaluations.glob("*.json"))]
    said = "\n".join(file.read_text() for file in sorted((tmp_path / "jobs").rglob("*.out")))
    assert [(r["size"], r["images"], r["step"]) for r in results] == [("32x48", images, 2), ("64x16", images, 2)], said
    assert "| Other" in said and f"{results[0]['fid']:.2f}" in said
