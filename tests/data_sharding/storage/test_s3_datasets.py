"""Writing, importing and verifying datasets on a real S3 server through a proxy that misbehaves: what is written is the
local dataset, bit for bit, and what is found is true; or there is one sentence, and the next call continues."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sharding.errors import DataError, StorageDown, UserError
from data_sharding.format.columns import COLUMNS
from data_sharding.format.manifest import Manifest
from data_sharding.storage import byte_ranges
from data_sharding.storage import files as storage_files
from data_sharding.storage import retry as retry_module
from data_sharding.storage.s3_store import S3Store
from data_sharding.storage.tar_members import list_tar
from data_sharding.verify import verify
from data_sharding.write.image_sources import open_source
from data_sharding.write.images import write_dataset
from tests.services.faultproxy import FaultProxy, Rule
from tests.services.rgw import environment
from tests.services.s3 import use

pytestmark = pytest.mark.s3

BUCKET = "datasets"
FAULTS = {
    "503 storm": [Rule("status", method=m, every=2, count=6) for m in ("GET", "PUT", "HEAD", "POST")],
    "500s": [Rule("status", method=m, status=500, every=2, count=6) for m in ("GET", "PUT", "HEAD", "POST")],
    "resets": [Rule("reset", method=m, every=2, count=6) for m in ("GET", "PUT", "HEAD", "POST")],
    "lost replies": [Rule("drop_reply", method=m, every=2, count=6) for m in ("GET", "PUT", "HEAD", "POST")],
    "cut": [Rule("cut", after=after, every=2, count=3) for after in (0, 50)],
    "stalls": [Rule("stall", method=m, every=3, count=2) for m in ("GET", "PUT")],
}
WRONG = {"short": [Rule("short", path="tar.zst", after=n, count=1) for n in (0, 9000)]} | {
    "corrupt": [Rule("corrupt", path="tar.zst", after=n, count=1) for n in (0, 9000, 20_000)]
}


@pytest.fixture(scope="module")
def bucket(client) -> str:
    client.create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}"


@pytest.fixture
def proxy(rgw, bucket, monkeypatch):
    monkeypatch.setattr(retry_module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry_module, "_LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(storage_files, "_CALL", replace(storage_files._CALL, deadline=300, attempt=0.7))
    write_with(monkeypatch, deadline=300, attempt=0.7)
    with FaultProxy(rgw.port) as proxy:
        use(monkeypatch, environment(proxy.port))
        yield proxy


def write_with(monkeypatch, **policy: float) -> None:
    """Whole files, and those that are created once."""
    monkeypatch.setattr(storage_files, "_WHOLE_FILE", changed := replace(storage_files._WHOLE_FILE, **policy))
    monkeypatch.setattr(S3Store.__init__, "__defaults__", (changed,))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for i in range(60):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def local(pictures, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("local") / "set"
    write(pictures, path)
    return path


def write(src: Path, dst) -> None:
    write_dataset(str(src), str(dst), max_tokens=16, workers=1, images_per_shard=20, holdout=0.1, progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def objects(client, prefix: str) -> dict[str, bytes]:
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
    keys = [item["Key"] for item in listed]
    return {key[len(prefix) + 1 :]: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def upload(client, folder: Path, prefix: str) -> None:
    for name, data in files(folder).items():
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)


@pytest.mark.parametrize("fault", FAULTS)
def test_writing_through_faults(proxy, bucket, client, pictures, local, fault):
    proxy.rules = [replace(rule) for rule in FAULTS[fault]]
    write(pictures, f"{bucket}/{fault}")
    assert len(proxy.fired) > 3
    assert objects(client, fault) == files(local)


@pytest.mark.parametrize("outage", [[Rule("status", method="PUT", skip=4)], [Rule("reset", method="PUT", skip=4)]])
def test_an_outage_ends_the_writing_and_the_next_call_continues(
    proxy, bucket, client, pictures, local, outage, monkeypatch
):
    url = f"{bucket}/{outage[0].action}"
    proxy.rules = [replace(rule) for rule in outage]
    with monkeypatch.context() as patch:
        write_with(patch, deadline=2)
        with pytest.raises(StorageDown, match="cannot be reached: .*, retried for 2 s; check"):
            write(pictures, url)
    write_with(monkeypatch, attempt=100)
    proxy.rules, proxy.requests[:] = [], []
    write(pictures, url)
    assert objects(client, outage[0].action) == files(local)
    puts = [request for request in proxy.requests if request.startswith("PUT") and request.endswith(".tar.zst")]
    assert 0 < len(puts) < 4  # not those that were there


def test_refused_writing_is_one_sentence(proxy, bucket, pictures):
    proxy.rules = [Rule("status", method="PUT", status=403)]
    with pytest.raises(UserError, match="access to .* is refused .*check the credentials and their permissions"):
        write(pictures, f"{bucket}/refused")


@pytest.mark.parametrize("fault", FAULTS | WRONG)
def test_verifying_through_faults_finds_nothing(proxy, bucket, client, local, fault):
    upload(client, local, "whole")
    proxy.rules = [replace(rule) for rule in (FAULTS | WRONG)[fault]]
    assert verify(f"{bucket}/whole").problems == ()
    assert proxy.fired


def test_verifying_through_faults_finds_the_damage(proxy, bucket, client, local):
    upload(client, local, "damaged")
    name = Manifest.load(str(local)).shards[1].name
    data = bytearray((local / name).read_bytes())
    data[777] ^= 1
    client.put_object(Bucket=BUCKET, Key=f"damaged/{name}", Body=bytes(data))
    proxy.rules = [replace(rule) for rule in FAULTS["503 storm"] + WRONG["corrupt"]]
    (problem,) = verify(f"{bucket}/damaged").problems
    assert f"{name}, frame" in problem and "do not match their digest" in problem


def test_verifying_in_an_outage_is_one_sentence(proxy, bucket, client, local, monkeypatch):
    upload(client, local, "away")
    monkeypatch.setattr(storage_files, "_CALL", replace(storage_files._CALL, deadline=1))
    proxy.rules = [Rule("status", path="tar.zst")]
    began = time.monotonic()
    with pytest.raises(StorageDown, match="cannot be reached: 503 SlowDown, retried for 1 s; check AWS_ENDPOINT_URL"):
        verify(f"{bucket}/away")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("cached", [False, True])
def test_opening_through_faults(proxy, bucket, client, local, cached, tmp_path):
    """All columns are there, or a sentence says which is not what was written."""
    upload(client, local, "opened")
    cache = str(tmp_path) if cached else ""
    expected = Manifest.load(str(local))
    for rules in FAULTS.values():
        proxy.rules = [replace(rule) for rule in rules]
        found = Manifest.load(f"{bucket}/opened", str(tmp_path / str(len(proxy.fired))) if cached else "")
        assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in COLUMNS)
    assert len(proxy.fired) > 20
    proxy.rules = [Rule("corrupt", path="size.npy", after=200)]
    with pytest.raises(DataError, match=r"size\.npy does not match its digest"):
        Manifest.load(f"{bucket}/opened", cache)
    proxy.rules = [Rule("short", path="size.npy", after=200)]
    with pytest.raises(DataError, match=r"size\.npy ends before byte"):
        Manifest.load(f"{bucket}/opened", cache)
    proxy.rules = [Rule("short", path="manifest.json", after=200)]
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(f"{bucket}/opened", cache)


@pytest.mark.parametrize("fault", [*FAULTS, "short"])
def test_a_source_on_s3_is_listed_through_faults(proxy, bucket, client, pictures, tmp_path, monkeypatch, fault):
    """A tar of class tars, read in pieces smaller than itself."""
    import tarfile

    monkeypatch.setattr(byte_ranges, "_BUFFER", 10_000)
    with tarfile.open(tmp_path / "all.tar", "w") as outer:
        for folder in sorted(pictures.iterdir()):
            with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as inner:
                for file in sorted(folder.iterdir()):
                    inner.add(file, file.name)
            outer.add(tmp_path / f"{folder.name}.tar", f"{folder.name}.tar")
    client.put_object(Bucket=BUCKET, Key="all.tar", Body=(tmp_path / "all.tar").read_bytes())
    short = [Rule("short", path="all.tar", after=n, every=2, count=1) for n in (1, 2)]
    proxy.rules = [replace(rule) for rule in FAULTS.get(fault, short)]
    here, there = open_source(str(tmp_path / "all.tar")), open_source(f"{bucket}/all.tar")
    assert there.digest == here.digest and [e.id for e in there.entries] == [e.id for e in here.entries]
    assert there.entries[-1].data.read() == here.entries[-1].data.read()
    assert len(list(list_tar(f"{bucket}/all.tar"))) == 3 and proxy.fired
