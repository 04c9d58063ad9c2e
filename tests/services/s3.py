"""The real S3 server, one for all tests of a session, and a client of it."""

import os

import pytest

from data_sharding.storage import filesystems
from tests.services.rgw import KEY, SECRET, Rgw


@pytest.fixture(scope="session")
def rgw(tmp_path_factory):
    with Rgw.or_skip(tmp_path_factory.mktemp("rgw")) as server:
        yield server


@pytest.fixture(scope="session")
def client(rgw):
    from botocore.session import get_session

    return get_session().create_client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{rgw.port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


def use(monkeypatch, env: dict[str, str]) -> None:
    """Until the test ends, this process's S3 is the one of ``env``; then it is again what it was."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(filesystems, "_connected", {})
