"""Uploaders that begin together share one SQLite file that none has made yet."""

import os
import subprocess
import sys

from mlflow import MlflowClient

PROGRAM = """
import sys, time
from fitv2_scale.tracking.mlflow_sink import Server

uri, name, at = sys.argv[1:]
time.sleep(max(0, float(at) - time.time()))
Server(uri, "sizes", None).open_run("fitv2.run_id", name, start_ms=0, name=name, tags={})
"""


def test_three_at_once(tmp_path):
    """At the same moment, once all have imported mlflow."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    at = str(float(os.path.getmtime(tmp_path)) + 8)
    made = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, uri, f"run-{i}", at], stderr=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    for process in made:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("sizes").experiment_id])
    assert {run.data.tags["fitv2.run_id"] for run in found} == {"run-0", "run-1", "run-2"}
