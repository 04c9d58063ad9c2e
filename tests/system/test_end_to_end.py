"""The program as its users run it: photographs to shards, torchrun, kill -9, the same command, MLflow, pictures."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fitv2_scale.run.run import Run
from tests.support.repository import ROOT
from tests.support.run_history import losses
from tests.support.waiting import wait

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["model.depth=2", "model.hidden=64", "batch.images=16", "train.steps=12", "train.log_every=1"]
SMALL += ["checkpoint.every_steps=3", "validation.every_steps=4"]
SMALL += ["sampling.every_steps=6", "sampling.steps=3", "sampling.columns=3"]


def fitv2(*arguments: str) -> str:
    command = [sys.executable, "-m", "fitv2_scale.cli", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def train(run: Path, data: Path) -> subprocess.Popen:
    overrides = [f"run={run}", f"data.url={data}", *SMALL]
    command = [*TORCHRUN, "-m", "fitv2_scale.cli", "train", str(ROOT / "configs/demo.yaml"), *overrides]
    return subprocess.Popen(command, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_all(run: Path) -> None:
    """SIGKILL to torchrun and its ranks, but not to the uploader, which has no part in training."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"run={run}".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.mark.services
def test_photographs_to_pictures_through_a_kill(tmp_path):
    crops, data, run = tmp_path / "crops", tmp_path / "data", tmp_path / "runs" / "first"
    subprocess.run([sys.executable, "-m", "launchers.demo_images", str(crops), "--crops", "90"], check=True, cwd=ROOT)
    fitv2("shard", "write", str(crops), str(data), "--max-tokens", "100", "--holdout", "0.1")
    assert json.loads(fitv2("shard", "verify", str(data), "--json"))["problems"] == []
    plan = json.loads(fitv2("plan", str(ROOT / "configs/demo.yaml"), f"data.url={data}", *SMALL, "--json"))
    assert plan["data"]["images"] == 81 and plan["data"]["classes"] == 6

    launched = train(run, data)
    wait("step 6 to be saved", lambda: any((run / "steps").glob("00000006*/manifest.json")))
    assert launched.poll() is None
    kill_all(run)
    assert launched.wait() != 0
    again = train(run, data)
    assert again.wait() == 0

    status = json.loads(fitv2("status", str(run), "--json"))
    assert [a["code"] for a in status["attempts"]] == [None, 0] and status["last_commit"]["step"] == 12
    assert [c["problems"] for c in json.loads(fitv2("checkpoint", "verify", str(run), "--json"))] == [[], []]
    assert list(losses(str(run))) == list(range(1, 13))

    # MLflow, as its user finds it: one run, one unbroken curve, the pictures.
    fitv2("track", "sync", str(run))
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    in_mlflow = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    (tracked,) = [found for found in in_mlflow if "fitv2.run_id" in found.data.tags]
    live = [found.data.tags for found in in_mlflow if found is not tracked]
    assert {tags["fitv2.live_id"] for tags in live} == {f"{tracked.data.tags['fitv2.run_id']}/{n}" for n in (1, 2)}
    assert {tags["mlflow.parentRunId"] for tags in live} == {tracked.info.run_id}
    assert tracked.data.tags["fitv2.family"] == "2x64" and int(tracked.data.tags["fitv2.parameters"]) > 0
    assert len(tracked.data.tags["fitv2.dataset"]) == 64 and tracked.data.tags["fitv2.gpu"] == "none"
    assert tracked.info.status == "FINISHED" and tracked.data.tags["fitv2.run_id"] == Run.open(str(run)).id
    assert tracked.data.params["model.hidden"] == "64"
    keys = ["loss", "grad_norm", "lr", "images_per_second", "tokens_per_second", "packing_fill", "rank_imbalance"]
    keys += ["images", "tokens", "flops", "gpu_hours", "goodput"]
    steps = dict.fromkeys(keys, list(range(1, 13))) | dict.fromkeys(("val_loss", "val_loss_ema"), [4, 8, 12])
    for key, expected in steps.items():
        assert [p.step for p in client.get_metric_history(tracked.info.run_id, key)] == expected, key
    assert [p.value for p in client.get_metric_history(tracked.info.run_id, "loss")] == list(losses(str(run)).values())
    artifacts = [a.path for a in client.list_artifacts(tracked.info.run_id, "samples")]
    assert artifacts == ["samples/00000006.png", "samples/00000012.png"]

    fitv2("sample", str(run), "--size", "64x96", "--steps", "2", "--out", str(tmp_path / "more.png"))
    assert (tmp_path / "more.png").stat().st_size > 1000
    exported = json.loads(fitv2("checkpoint", "export", str(run), str(tmp_path / "ema.safetensors"), "--ema", "--json"))
    assert exported == {"file": str(tmp_path / "ema.safetensors"), "step": 12, "ema": True, "format": "fit"}
    imported = fitv2("checkpoint", "import", str(tmp_path / "ema.safetensors"), str(tmp_path / "runs" / "second"),
                     "--config", str(write_config(tmp_path, data)))  # fmt: skip
    assert "commit at step 0" in imported


def write_config(folder: Path, data: Path) -> Path:
    shown = json.loads(fitv2("config", "show", str(ROOT / "configs/demo.yaml"), f"data.url={data}", *SMALL, "--json"))
    path = folder / "shown.yaml"
    lines = [f"{key}: {json.dumps(entry['value'])}" for key, entry in shown.items()]
    tree: dict = {}
    for line in lines:
        dotted, value = line.split(": ", 1)
        *parents, leaf = dotted.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = json.loads(value)
    path.write_text(json.dumps(tree))
    return path
