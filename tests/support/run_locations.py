"""Where tests have their runs: on local disk, on the real S3 server, or beside the database that they publish to."""

from pathlib import Path

import pytest

from tests.services.s3 import use

BUCKET = "runs"
PART = 100 << 10  # bytes of an S3 upload's part, so that a save of 240 kB is several


@pytest.fixture
def location(request, tmp_path, monkeypatch):
    """``location("local")`` or ``location("s3")``: (environment, a function that makes URLs)."""

    def make(kind: str):
        if kind == "local":
            return {}, lambda name: str(tmp_path / name)
        rgw, client = request.getfixturevalue("rgw"), request.getfixturevalue("client")
        if BUCKET not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        use(monkeypatch, rgw.environment)
        return rgw.environment, lambda name: f"s3://{BUCKET}/{tmp_path.name}/{name}"

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs, which all publish to one mlflow.db beside them: making that takes MLflow seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_folder(runs, request) -> Path:
    return runs / request.node.name
