"""Uploaders that begin together share one SQLite file that none has made yet."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from data_sharding.errors import UserError
from fitv2_scale.tracking.locks import RunLock

PROGRAM = """
import sys
import mlflow
from fitv2_scale.tracking.mlflow_writer import Server

uri, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
Server(uri, "sizes", None).open_run("fitv2.run_id", name, start_ms=0, name=name, tags={})
"""


def test_a_run_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "tracking").touch()
    run = SimpleNamespace(local_path=lambda rel: tmp_path / rel)
    with pytest.raises(UserError, match=f"^{tmp_path}/tracking/lock cannot be used: File exists; give another path"):
        RunLock(run)


def test_three_at_once(tmp_path):
    """At the same moment, once all have imported mlflow."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    made = [subprocess.Popen([sys.executable, "-c", PROGRAM, uri, f"run-{i}"], text=True, **pipes) for i in range(3)]
    assert [process.stdout.readline() for process in made] == ["ready\n"] * 3
    for process in made:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in made:
        _, said = process.communicate()
        assert process.returncode == 0, said
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("sizes").experiment_id])
    assert {run.data.tags["fitv2.run_id"] for run in found} == {"run-0", "run-1", "run-2"}
