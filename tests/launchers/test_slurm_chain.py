"""The life of a chain of jobs on a real Slurm: real slurmctld and slurmd's, real checkpoints, a tiny model."""

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import DONE, train
from launchers.control import job_name, jobs
from tests.support.rank_processes import ranks_of_job
from tests.support.ranks import run_ranks
from tests.support.run_history import audited, losses, reach, trained
from tests.support.slurm_jobs import (
    attempts,
    end_of,
    has_pending,
    queue,
    running,
    story,
    wait_for_the_end,
)
from tests.support.tiny_runs import IMAGES
from tests.support.waiting import wait

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_chain_moves_from_two_nodes_to_four_to_one(slurm, fitv2, job_config, tiny, tmp_path):
    """The first job reaches its time limit, the second one is asked by TERM, the third one while it imports torch."""
    options = {"train__steps": 100_000, "checkpoint__keep_last": 50, "checkpoint__every_steps": 100_000}
    run = str(tmp_path / "run")
    fitv2("submit", job_config(**options), "--nodes", "2", "slurm.walltime=1", "slurm.signal_seconds=10")
    moves = []

    def saved(attempt: int, why: str) -> None:
        end = wait(f"the end of attempt {attempt}", lambda: end_of(run, attempt))
        assert end["code"] == 75 and end["reason"].startswith(f"{why}: saved at step"), story(run)
        step = Run.open(run).log.commits()[-1].fields["step"]
        assert step == audited(run, attempt)[-1] + 1  # nothing that was done is lost
        moves.append(step)
        wait("it to go", lambda ended=job: running(slurm) != ended)

    job = wait("a job", lambda: running(slurm))
    fitv2("submit", job_config(**options), "--nodes", "4")  # while it runs: its successor is replaced
    both = ["PENDING", "RUNNING"]
    wait("one to run and one behind it", lambda: sorted(line.split()[1] for line in queue(slurm)) == both)
    saved(1, "SIGUSR1")

    job = wait("a job", lambda: running(slurm))
    fitv2("submit", job_config(**options), "--nodes", "1")
    reach(run, moves[-1] + 25, 2)
    slurm.run("scancel", "--signal=TERM", job)
    saved(2, "SIGTERM")

    job, steps = wait("a job", lambda: running(slurm)), moves[-1] + 60
    fitv2("submit", job_config(**options | {"train__steps": steps}), "--nodes", "1")
    wait("its first line", lambda: any(f"== job {job} task 0" in f.read_text() for f in Path(run).rglob("rank-0.log")))
    rank = ranks_of_job(job)[0]
    os.kill(rank, signal.SIGSTOP)  # else it may be through with that before Slurm gets to it
    slurm.run("scancel", "--signal=USR1", job)
    wait("the signal", lambda: has_pending(rank, signal.SIGUSR1))
    os.kill(rank, signal.SIGCONT)
    saved(3, "SIGUSR1")
    assert len(audited(run, 3)) == 1  # it was held back until it could be noted

    wait_for_the_end(slurm)
    assert [code for _, code in attempts(run)][-1] == 0, story(run)
    assert [len(job["nodes"]) for job in jobs(Run.open(run))][:3] == [2, 4, 1]

    undisturbed = tiny("undisturbed", train__steps=steps, checkpoint__every_steps=100_000)
    assert run_ranks(1, train, undisturbed, timeout=600) == [DONE]
    assert trained(run) == trained(undisturbed.run)  # ids, bits of the times, digests of the noise
    seen = Counter((epoch, image) for images in trained(run).values() for epoch, image, *_ in images)
    whole = steps * 12 // IMAGES
    assert set(seen.values()) == {1} and [Counter(e for e, _ in seen)[e] for e in range(whole)] == [IMAGES] * whole
    assert losses(run) == pytest.approx(losses(undisturbed.run), rel=1e-3)
    for step in moves:  # one process that continues from the same commit
        alone = tiny(f"alone{step}", **options | {"train__steps": step + 20})
        assert run_ranks(1, train, alone, f"{run}@{step}") == [DONE]
        expected = losses(alone.run)
        assert len(expected) == 20
        assert {s: losses(run)[s] for s in expected} == pytest.approx(expected, rel=1e-6)


def test_save_stop_and_stop_now(slurm, fitv2, job_config, tiny):
    options = {"train__steps": 100_000, "checkpoint__every_steps": 50_000}
    config = tiny(**options)
    fitv2("submit", job_config(**options), "--nodes", "2")
    reach(config.run, 3, 1)
    assert "attempt 1 commits at its next step" in fitv2("save", config.run)
    run = Run.open(config.run)
    wait("a commit", run.log.commits)
    assert end_of(config.run, 1) is None  # it still runs
    said = fitv2("stop", config.run)
    assert "STOP is in its log; the running attempt saves and ends" in said and "is cancelled" in said
    wait_for_the_end(slurm)
    end = end_of(config.run, 1)
    assert end["code"] == 75 and end["reason"].startswith("STOP: saved at step"), story(config.run)
    commits = len(run.log.commits())
    assert commits == 2 and len(jobs(run)) == 1
    assert "there is nothing to save" in fitv2("save", config.run, code=2)
    assert "attempt 1 starts with 2 ranks" in fitv2("logs", config.run)
    assert "task 1 on node" in fitv2("logs", config.run, "--rank", "1")

    fitv2("submit", job_config(**options), "--nodes", "1")  # takes the STOP back
    reach(config.run, run.log.commits()[-1].fields["step"] + 3, 2)
    said = fitv2("stop", config.run, "--now")
    assert "are killed" in said and "is cancelled" in said
    wait_for_the_end(slurm)
    end = end_of(config.run, 2)
    assert end is None or "without saving" in end["reason"], story(config.run)
    assert len(run.log.commits()) == commits and len(jobs(run)) == 2
    assert "chain: stopped" in fitv2("status", config.run)

    fitv2("submit", job_config(**options), "--nodes", "1")
    reach(config.run, run.log.commits()[-1].fields["step"] + 3, 3)
    slurm.run("scancel", "--name", job_name(run.id))  # what there is of the chain; it saves all the same
    wait_for_the_end(slurm)
    assert end_of(config.run, 3)["code"] == 75 and len(jobs(run)) == 3, story(config.run)
    assert run.log.commits()[-1].attempt == 3


@pytest.mark.parametrize(
    "words,said",
    [
        (["slurm.partition=gpu"], "invalid partition specified: gpu .*this cluster has .*test"),
        (["--nodes", "9"], "sbatch fails: .*(node|Node)"),
        (["slurm.extra=[--no-such-option]"], "sbatch fails: .*no-such-option"),
        (["data.url=/no/such/set"], "there is no dataset at /no/such/set"),
        (["data.url=preset:imagenet256"], "preset:imagenet256 has sizes only"),
        (["train.stepps=3"], "unknown key train.stepps, did you mean train.steps?"),
    ],
)
def test_what_is_wrong_is_reported_before_anything_is_queued(slurm, fitv2, job_config, tmp_path, words, said):
    error = fitv2("submit", job_config(), *words, code=2)
    assert re.search(said, error) and error.count("fitv2: ") == 1, error
    assert not (tmp_path / "run").exists() and queue(slurm) == []


def test_a_secret_goes_along_and_is_written_nowhere(slurm, fitv2, job_config, monkeypatch, tmp_path):
    """Nodes are examined first, here and nowhere else in these tests."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    uri, file = "tracking.uri=http://me:hunter2@127.0.0.1:9", job_config(slurm__doctor=True)
    shown = fitv2("submit", file, uri, "--nodes", "2", "--dry-run") + fitv2("submit", file, uri, "--nodes", "2")
    run = str(tmp_path / "run")
    wait("its end", lambda: (end_of(run, 1) or queue(slurm) == []) and list(Path(run).rglob("uploader.log")))
    assert attempts(run) == [(1, 0)], story(run)
    shown += fitv2("status", run) + fitv2("logs", run)
    assert "hunter2" not in shown
    slurm.run("scancel", "--user=root", "--signal=KILL", "--full")  # it waits for an MLflow that is not there
    wait_for_the_end(slurm)
    files = [file for file in Path(run).rglob("*") if file.is_file()]
    assert {"uploader.log", "start.json", "chain.json", "job.sh", "rank-0.log"} <= {file.name for file in files}
    assert [file for file in files if b"hunter2" in file.read_bytes()] == []
    # What ran was the copy of the code, though the job began in this folder, which has the packages too.
    assert list(Path(run).glob("jobs/*/code/fitv2_scale/train/__pycache__/loop.*.pyc"))
    (log,) = Path(run).glob("jobs/*/rank-0.log")
    assert all(f"ok     {what}" in log.read_text() for what in ("run folder", "data", "nodes alike", "collectives"))


def test_another_command_as_a_job(slurm, fitv2, dataset, job_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitv2("submit", job_config(), "--nodes", "2", "slurm.folder=jobs", "--", "shard", "verify", dataset)
    wait_for_the_end(slurm)
    (output,) = Path("jobs").glob("*/job-*.out")
    assert output.read_text().count(": no problems, ") == 2


@pytest.mark.mlflow
def test_a_sweep_is_a_chain_for_each_combination(slurm, fitv2, job_config, mlflow_server, tmp_path):
    """Three sizes are three runs of one experiment on an MLflow server, tagged and with their parameters, and
    `fitv2 curves` reads them there."""
    from mlflow import MlflowClient

    folder = tmp_path / "sweep"
    options = {"train__steps": 3, "tracking__uri": mlflow_server.uri, "tracking__experiment": "sizes"}
    mlflow_server.wait()
    fitv2("submit", job_config(**options), f"run={folder}", "--sweep", "model.depth=1,2,3")
    wait_for_the_end(slurm)
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"depth-1", "depth-2", "depth-3"}
    runs = [Run.open(str(folder / f"depth-{depth}")) for depth in (1, 2, 3)]
    assert [attempts(run.url) for run in runs] == [[(1, 0)]] * 3, story(runs[0].url)
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name("sizes").experiment_id
    found = client.search_runs([experiment], "tags.`fitv2.run_id` != ''")  # not the attempts, which are their children
    sizes = [parameter_count(ModelConfig(**run.config["model"])) for run in runs]
    tags = ("run_id", "recipe_hash", "family", "parameters")
    assert {tuple(r.data.tags[f"fitv2.{tag}"] for tag in tags) for r in found} == {
        (run.id, run.recipe_hash, f"{depth}x32", str(size))
        for depth, run, size in zip((1, 2, 3), runs, sizes, strict=True)
    }
    assert sorted(r.data.params["model.depth"] for r in found) == ["1", "2", "3"]
    assert all(r.info.status == "FINISHED" and r.data.metrics["loss"] > 0 for r in found)

    words = ["--experiment", "sizes", "--uri", mlflow_server.uri, "--out", str(tmp_path / "curves"), "--json"]
    read = json.loads(fitv2("curves", *words))["runs"]
    expected = {(run.id, size, 3, 36) for run, size in zip(runs, sizes, strict=True)}
    assert {(r["name"], r["parameters"], r["steps"], r["images"]) for r in read} == expected
