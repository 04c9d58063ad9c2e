"""A run on a real S3 server is the run that it would be on local disk; and what killed attempts leave behind."""

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from data_sharding.storage.open_store import open_store
from fitv2_scale.checkpoint.commit import attempt_of, commit_folder, verify_commit
from fitv2_scale.cli.__main__ import main
from fitv2_scale.run import local_files
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.tracking.uploader_process import Uploader
from fitv2_scale.train.loop import DONE, RETRY, train
from tests.services.s3 import use
from tests.support.commits import commit_bytes
from tests.support.paused_training import train_paused
from tests.support.ranks import Ranks, in_environment, run_ranks
from tests.support.run_history import losses
from tests.support.run_locations import BUCKET
from tests.support.waiting import wait


@pytest.fixture
def on_s3(location):
    """A function that makes URLs of this test's own."""
    return location("s3")[1]


@pytest.mark.s3
def test_storage_that_overwrites_is_refused(on_s3, client):
    """A versioned bucket of this server ignores the condition: two attempts could both have a number of the log."""
    client.create_bucket(Bucket="versioned")
    client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    with pytest.raises(UserError, match="a conditional create overwrites an existing object"):
        Run.open_or_create("s3://versioned/run", {}, {}, None)


@pytest.mark.s3
def test_what_a_user_can_get_wrong(on_s3, monkeypatch, capfd):
    for url, says in [
        ("s3://nosuchbucket/run", "is not a run"),
        (on_s3("none"), "is not a run"),
        ("s3://bucket", "names no folder in the bucket"),
    ]:
        for command in (["status"], ["checkpoint", "list"], ["checkpoint", "verify"], ["checkpoint", "sweep"]):
            assert main([*command, url]) == 2 and says in capfd.readouterr().err
    with pytest.raises(UserError, match="the bucket of .* does not exist: create it first"):
        Run.open_or_create("s3://nosuchbucket/run", {}, {}, None)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    use(monkeypatch, {k: v for k, v in os.environ.items() if k.startswith("AWS_")})
    began = time.monotonic()
    with pytest.raises(UserError, match="access to .* is refused"):
        Run.open(on_s3("none"))
    assert time.monotonic() - began < 10  # nothing to wait for: it was never right


def s3_commit_bytes(run: Run) -> dict[str, bytes]:
    """As lineage.commit_bytes."""
    folder = run.log.commits()[-1].fields["path"]
    files = [path for path in run.store.list(f"{folder}/") if path.endswith(".safetensors")]
    found = {Path(path).name: run.store.read(path) for path in files}
    scalars = json.loads(run.store.read(f"{folder}/manifest.json"))["scalars"]
    return found | {"scalars": json.dumps(scalars).encode()}


@pytest.mark.s3
def test_a_run_on_s3_is_the_run_on_local_disk(rgw, on_s3, tiny, tmp_path, capfd):
    """Killed, continued with the same command, and asked about: the same commits, curve and pictures."""
    # And with them MLflow, which this file's ranks do without.
    from fitv2_scale.tracking.destination import resolve_uri
    from fitv2_scale.tracking.sync import sync

    changes = {"train__steps": 20, "checkpoint__every_steps": 4, "sampling__every_steps": 10, "sampling__steps": 2}
    changes |= {"sampling__sizes": ["32x32"], "sampling__columns": 2}
    local = tiny("local", **changes)
    assert run_ranks(2, train, local) == [DONE, DONE]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = tiny("remote", run=on_s3("run"), **changes)
    ranks = Ranks(2, in_environment, rgw.environment, train_paused, config, 14)
    wait("step 8 to be committed", lambda: committed(config.run, 8))
    ranks.kill()
    assert run_ranks(2, in_environment, rgw.environment, train, config) == [DONE, DONE]
    assert run_ranks(2, in_environment, rgw.environment, train, config) == [DONE, DONE]  # nothing left to do

    run = Run.open(config.run)
    assert s3_commit_bytes(run) == commit_bytes(local.run)
    assert losses(config.run) == losses(local.run) and list(losses(config.run)) == list(range(1, 21))
    for name in ("samples/00000010.png", "samples/00000020.png"):
        assert run.store.read(name) == Path(local.run, name).read_bytes()
    report = status(run)
    assert [a["code"] for a in report["attempts"]] == [None, DONE] and report["last_commit"]["step"] == 20
    assert run.store.exists("attempts/2/journal/00000.jsonl") and run.store.exists("attempts/2/start.json")

    # The commands.
    assert main(["checkpoint", "list", config.run, "--json"]) == 0
    assert [c["step"] for c in json.loads(capfd.readouterr().out)] == [16, 20]
    assert main(["checkpoint", "verify", config.run, "--json"]) == 0
    assert all(c["problems"] == [] for c in json.loads(capfd.readouterr().out))
    out = str(tmp_path / "ema.safetensors")
    assert main(["checkpoint", "export", config.run, out, "--ema"]) == 0
    assert main(["checkpoint", "export", config.run, f"{on_s3('out')}/ema.safetensors", "--ema"]) == 0
    assert open_store(on_s3("out")).read("ema.safetensors") == Path(out).read_bytes()
    assert main(["checkpoint", "export", local.run, str(tmp_path / "local.safetensors"), "--ema"]) == 0
    assert Path(out).read_bytes() == (tmp_path / "local.safetensors").read_bytes()
    capfd.readouterr()

    # MLflow has the curve, from a machine that has only the URL.
    sent = sync(config.run, uri, "test")
    assert sent["pictures"] == 2 and sent["missing"] == 0 and sent["metrics"] > 20
    assert json.loads(run.store.read("tracking/ack.json"))["attempt"] == 2
    assert sync(config.run, uri, "test")["metrics"] == 0
    assert sync(config.run, "auto", "test")["metrics"] == 0  # where it was published before
    with pytest.raises(UserError, match="is on S3, which cannot hold an SQLite file: give the URI"):
        resolve_uri(on_s3("new"), "auto")

    # A fork from there, on local disk.
    child = tiny("child", train__steps=20, sampling__every_steps=0)
    assert run_ranks(2, in_environment, rgw.environment, train, child, f"{config.run}@16") == [DONE, DONE]
    assert commit_bytes(child.run) == commit_bytes(local.run)


def committed(url: str, step: int) -> bool:
    try:
        return any(e.fields["step"] >= step for e in Run.open(url).log.commits())
    except UserError:
        return False


@pytest.mark.s3
def test_an_uploader_follows_a_run_on_s3(rgw, on_s3, tmp_path):
    from fitv2_scale.tracking.journal import Journal

    run = Run.open_or_create(on_s3("run"), {"model": {"dim": 8}}, {}, "plan")
    attempt = run.claim({})
    journal = Journal(attempt.folder, 1, 0, attempt.upload)
    assert attempt.folder.is_relative_to(local_files.local_path(run.store, run.id, ""))
    uploader = Uploader(run.url, f"sqlite:///{tmp_path}/mlflow.db", "test")
    for step in range(1, 11):
        journal.metrics(step, {"loss": 1 / step})
        if step % 5 == 0:
            journal.seal()
            attempt.commit(step, f"steps/{step}", "sha256:0")
    attempt.end(0, "done")
    assert uploader.process.wait(300) == 0, run.local_path("tracking/uploader.log").read_text()
    assert json.loads(run.store.read("tracking/ack.json"))["segment"] == 1
    assert run.local_path("tracking/uploader.log").read_text() == ""


@pytest.mark.s3
def test_a_signal_saves_and_ships_the_logs(rgw, on_s3, tiny):
    config = tiny("remote", run=on_s3("run"), train__steps=3000, checkpoint__every_steps=3)
    ranks = Ranks(2, in_environment, rgw.environment, train, config)
    wait("a commit", lambda: committed(config.run, 3))
    ranks.terminate(0)
    assert ranks.results() == [RETRY, RETRY]
    run = Run.open(config.run)
    report = status(run)
    assert report["attempts"][0]["code"] == RETRY and report["attempts"][0]["why"].startswith("SIGTERM: saved at step")
    assert list(losses(config.run)) == list(range(1, report["last_commit"]["step"] + 1))
    assert run.store.list("attempts/1/audit/")  # what rank 0's node had


# ---- what is left behind ----


def test_folder_names():
    for folder, attempt in [
        ("steps/00000010.0001", 1),
        ("steps/00000010.0012.3", 12),
        ("steps/x", None),
        ("a.b", None),
    ]:
        assert attempt_of(folder) == attempt
    assert commit_folder(10, 12) == "steps/00000010.0012" and attempt_of(commit_folder(10, 12, 3)) == 12


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_sweep_says_first_and_deletes_only_what_nobody_needs(kind, request, tmp_path, capfd):
    url = str(tmp_path / "run") if kind == "local" else request.getfixturevalue("on_s3")("run")
    run = Run.open_or_create(url, {}, {}, None)
    store, first = run.store, run.claim({})
    first.commit(10, "steps/00000010.0001", "0")
    retired = first.commit(20, "steps/00000020.0001", "0")
    first.retire(retired.n)
    second = run.claim({})
    second.commit(30, "steps/00000030.0002", "0")
    needed = ["00000010.0001/a", "00000030.0002/a", "00000040.0002/a", "notes.txt"]  # the newest attempt may be saving
    waste = ["00000020.0001/a", "00000025.0001/a", "00000025.0001.1/b"]
    for path in needed + waste:
        store.put(f"steps/{path}", b"data")
    store.put("quarantine/00000002.json", b"{}")
    uploads = []
    if kind == "local":
        for name in ("00000025.0001", "00000026.0001", "00000040.0002"):
            staged = tmp_path / "run" / "steps" / name / f".big.{16 * '0'}.tmp"
            staged.parent.mkdir(exist_ok=True)
            staged.write_bytes(b"half")
        uploads = ["steps/00000025.0001/big", "steps/00000026.0001/big"]
    if kind == "s3":
        client = request.getfixturevalue("client")
        for name in ("00000025.0001", "00000040.0002"):
            key = f"{url.removeprefix(f's3://{BUCKET}/')}/steps/{name}/big"
            client.create_multipart_upload(Bucket=BUCKET, Key=key)
        uploads = ["steps/00000025.0001/big"]

    for yes in ([], [], ["--yes"]):
        before = store.list("")
        assert main(["checkpoint", "sweep", url, "--json", *yes]) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["abandoned"] == ["steps/00000025.0001", "steps/00000025.0001.1"]
        assert report["retired"] == ["steps/00000020.0001"] and [u[0] for u in report["uploads"]] == uploads
        assert report["deleted"] == bool(yes) and (yes or store.list("") == before)
    assert store.list("steps/") == sorted(f"steps/{path}" for path in needed)
    assert [path for path, _ in store.uploads()] == ["steps/00000040.0002/big"]  # the newest attempt's
    assert main(["checkpoint", "sweep", url]) == 0 and "nothing was left behind" in capfd.readouterr().out

    second.end(75, "SIGTERM")  # now it saves nothing more
    assert main(["checkpoint", "sweep", url]) == 0
    said = capfd.readouterr().out
    assert "steps/00000040.0002: saved by an attempt that ended, never committed" in said and "--yes deletes" in said
    assert main(["checkpoint", "sweep", url, "--yes"]) == 0 and "all are deleted" in capfd.readouterr().out
    assert store.list("steps/") == [f"steps/{path}" for path in (*needed[:2], needed[3])] and not store.uploads()
    if kind == "local":
        assert sorted(p.name for p in (tmp_path / "run" / "steps").iterdir()) == [
            "00000010.0001",
            "00000030.0002",
            "notes.txt",
        ]


@pytest.mark.s3
def test_damage_on_s3_is_found_and_passed_over(on_s3, rgw):
    """Each byte position of a small commit flipped, the file cut, each file removed."""
    from tests.support.checkpoint_state import recover

    url = on_s3("run")
    run_ranks(1, three_commits, rgw.environment, url)
    run = Run.open(url)
    newest = run.log.commits()[-1]
    for name in ("rank-00000.safetensors", "manifest.json"):
        path = f"{newest.fields['path']}/{name}"
        whole = run.store.read(path)
        flips = range(0, len(whole), max(1, len(whole) // 12))
        damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in flips]
        for data in (*damaged, whole[:-1], b"", None):
            run.store.put(path, data) if data is not None else run.store.delete_tree(path) or remove(run, path)
            (problem, *_) = verify_commit(run, newest)
            assert name in problem
        if name.startswith("rank"):
            run.store.put(path, whole)
    ((found,),) = run_ranks(1, partial(recover, rows=3), rgw.environment, url)
    assert (
        found["step"] == 2 and len(found["passed_over"]) == 1 and "manifest.json is missing" in found["passed_over"][0]
    )
    record = json.loads(Run.open(url).store.read(f"quarantine/{newest.n:08d}.json"))
    assert record["path"] == newest.fields["path"]


def remove(run: Run, path: str) -> None:
    run.store._request("rm_file", path)


def three_commits(env, url: str) -> None:
    from tests.support.checkpoint_state import opened, saver

    with opened(env, url) as (world, run):
        save = saver(world, run, rows=3)
        assert [save(step) for step in (1, 2, 3)] == [None] * 3
