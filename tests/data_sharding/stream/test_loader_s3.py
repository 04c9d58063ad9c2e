"""Streaming from a real S3 server through a proxy that misbehaves: the batches are those of the local dataset, bit for
bit, or there is one sentence; never a hang, never a short or wrong frame."""

import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_sharding.errors import StorageDown, UserError
from data_sharding.format.manifest import Manifest
from data_sharding.plan.plan import Plan, Segment
from data_sharding.storage.files import put, read
from data_sharding.storage.retry import RetryPolicy
from data_sharding.stream.disk_cache import DiskCache
from data_sharding.stream.frames import FrameReader, UnreadableFrame, fetch_frame
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import DONE, RETRY, train
from tests.services.faultproxy import FaultProxy, Rule
from tests.services.rgw import KEY, SECRET, environment
from tests.services.s3 import use
from tests.support.commits import commit_bytes
from tests.support.loaders import loader, same
from tests.support.paused_training import train_paused
from tests.support.ranks import Ranks, in_environment, run_ranks
from tests.support.run_history import losses, reach
from tests.support.tiny_runs import make_tiny
from tests.support.waiting import wait

pytestmark = pytest.mark.s3

BUCKET, SHARDS = "data", r"\.tar\.zst"
STEPS = range(14)


@pytest.fixture(scope="session")
def url(client, dataset) -> str:
    """The dataset of conftest, on S3."""
    client.create_bucket(Bucket=BUCKET)
    upload(client, dataset, "set")
    return f"s3://{BUCKET}/set"


def upload(client, folder: str, prefix: str) -> None:
    for path in Path(folder).rglob("*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


@pytest.fixture
def proxy(rgw, url, monkeypatch):
    """All of this process's S3 goes through it."""
    with FaultProxy(rgw.port) as proxy:
        use(monkeypatch, environment(proxy.port))
        yield proxy


def plan_of(url: str) -> Plan:
    return Plan([Manifest.load(url)], 5, "mixed", [Segment(0, 12, (1,))])


@pytest.fixture(scope="session")
def undisturbed(dataset):
    with loader(plan_of(dataset), steps=STEPS) as batches:
        return list(batches)


def gets(proxy: FaultProxy) -> list[str]:
    return [request for request in proxy.requests if SHARDS.replace("\\", "") in request]


FAULTS = {
    "calm": [],
    "503 storm": [Rule("status", count=25, path=SHARDS)],
    "500s": [Rule("status", status=500, count=10, path=SHARDS)],
    "403 in the middle": [Rule("status", status=403, count=10, skip=2, path=SHARDS)],
    "resets": [Rule("reset", count=16, path=SHARDS)],
    "lost replies": [Rule("drop_reply", count=16, path=SHARDS)],
    "cut": [Rule("cut", after=10_000, count=8, path=SHARDS)],
    "cut at once": [Rule("cut", after=0, count=8, path=SHARDS)],
    "short": [Rule("short", after=10_000, count=2, path=SHARDS), Rule("short", after=20_000, count=3, path=SHARDS)],
    "a byte short": [Rule("short", after=10_000, count=1, path=SHARDS)],
    "corrupt": [Rule("corrupt", after=n, count=1, path=SHARDS) for n in (0, 9_000, 20_000, 7)],
    "stalls": [Rule("stall", after=5_000, count=5, path=SHARDS)],
    "a drip": [Rule("drip", after=5_000, count=2, path=SHARDS)],
    "everything": [
        rule
        for n in range(2)
        for rule in (
            Rule("status", count=3, path=SHARDS),
            Rule("reset", count=3, path=SHARDS),
            Rule("corrupt", after=100 + n, count=1, path=SHARDS),
            Rule("stall", after=100, count=1, path=SHARDS),
            Rule("short", after=300 + n, count=1, path=SHARDS),
            Rule("cut", after=300, count=2, path=SHARDS),
            Rule("status", status=403, count=2, path=SHARDS),
        )
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_batches_are_those_of_the_undisturbed_run(proxy, url, undisturbed, fault):
    plan = plan_of(url)
    proxy.rules = [replace(rule) for rule in FAULTS[fault]]
    reader = FrameReader(RetryPolicy(deadline=300, attempt=0.7 if fault in ("stalls", "a drip", "everything") else 100))
    began = time.monotonic()
    with loader(plan, steps=STEPS, reader=reader) as batches:
        for expected, found in zip(undisturbed, batches, strict=True):
            assert same(expected, found)
    assert all(rule.count == 0 for rule in proxy.rules), "not all faults fired"
    assert time.monotonic() - began < 40
    if fault == "calm":
        assert len(gets(proxy)) == len(plan.manifests[0].frame_shard)  # whole frames, each once


@pytest.mark.parametrize("action", ["status", "stall", "reset", "cut"])
def test_storage_is_down_at_the_deadline(proxy, url, action):
    """And not later, and without a flood of requests: the client's own retries are off. No frame is at fault.

    A pause that would pass the deadline is not begun. The first four take 0.75 to 1.5 s, the fifth 0.8 to 1.6 s more:
    with a deadline of 3.2 s all five are waited for.
    """
    manifest = Manifest.load(url)
    proxy.rules = [Rule(action, path=SHARDS)]
    began = time.monotonic()
    with pytest.raises(StorageDown, match="retried for 3 s"):
        fetch_frame(manifest, 0, RetryPolicy(deadline=3.2, attempt=0.5))
    assert 1 < time.monotonic() - began < 15 and len(gets(proxy)) < 25
    with loader(plan_of(url), steps=STEPS, reader=FrameReader(RetryPolicy(deadline=1, attempt=0.5))) as batches:
        with pytest.raises(StorageDown, match="retried for 1 s"):
            next(batches)
        proxy.rules = []


def test_an_outage_is_not_an_unreadable_frame(proxy, url, monkeypatch):
    monkeypatch.setattr("data_sharding.stream.frames._PROBE", 0.5)
    manifest = Manifest.load(url)
    for rule in (Rule("status"), Rule("reset"), Rule("stall"), Rule("status", status=403)):
        proxy.rules = [rule]
        with pytest.raises(StorageDown, match=f"s3://{BUCKET}/set cannot be reached .*: check the storage"):
            fetch_frame(manifest, 0, RetryPolicy(deadline=1, attempt=0.5))


def test_damage_in_storage_is_reported_soon(proxy, url, client, dataset):
    upload(client, dataset, "bad")
    names = [shard.name for shard in Manifest.load(dataset).shards]
    client.delete_object(Bucket=BUCKET, Key=f"bad/{names[0]}")
    client.put_object(Bucket=BUCKET, Key=f"bad/{names[1]}", Body=Path(dataset, names[1]).read_bytes()[:5000])
    client.put_object(Bucket=BUCKET, Key=f"bad/{names[2]}", Body=b"")
    flipped = bytearray(Path(dataset, names[3]).read_bytes())
    flipped[777] ^= 1
    client.put_object(Bucket=BUCKET, Key=f"bad/{names[3]}", Body=bytes(flipped))
    manifest, began = Manifest.load(f"s3://{BUCKET}/bad"), time.monotonic()
    for f, cause in enumerate(("the shard is missing", "5000 of its", "ends before", "do not match their digest")):
        with pytest.raises(UnreadableFrame, match=f"frame {f} .*{cause}"):
            fetch_frame(manifest, f)
    assert time.monotonic() - began < 5  # no error was retried until the deadline


def test_renewed_credentials_are_seen(proxy, url, dataset, monkeypatch, tmp_path):
    """The real server refuses a wrong secret; the right one appears in the credentials file while we wait."""
    file = tmp_path / "credentials"

    def write(secret: str) -> None:
        (tmp_path / "new").write_text(f"[default]\naws_access_key_id={KEY}\naws_secret_access_key={secret}\n")
        (tmp_path / "new").replace(file)

    manifest = Manifest.load(url)
    env = environment(proxy.port) | {"AWS_SHARED_CREDENTIALS_FILE": str(file)}
    del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]
    use(monkeypatch, env)
    write("wrong")
    with pytest.raises(UserError, match="access to s3://data/set/manifest.json is refused .403"):
        Manifest.load(url)
    renewal = threading.Timer(1.0, write, [SECRET])
    renewal.start()
    data = fetch_frame(manifest, 0, RetryPolicy(deadline=300, attempt=5))
    assert SECRET in file.read_text() and data == Path(dataset, manifest.shards[0].name).read_bytes()[: len(data)]


def test_a_put_whose_reply_is_lost(proxy):
    proxy.rules = [Rule("drop_reply", method="PUT", count=2), Rule("status", method="PUT", count=2)]
    put(f"s3://{BUCKET}/lost/reply", b"whole")
    assert read(f"s3://{BUCKET}/lost/reply") == b"whole" and all(rule.count == 0 for rule in proxy.rules)
    with pytest.raises(FileNotFoundError):
        read(f"s3://{BUCKET}/lost/none")


@pytest.fixture
def on_s3(url, tmp_path):
    def make(name: str, **changes):
        defaults = {"train__steps": 24, "data__deadline_seconds": 120, "checkpoint__every_steps": 5}
        return make_tiny(url, tmp_path, name, **(defaults | changes))

    return make


def test_training_through_storms_ends_bit_equal(proxy, on_s3, tiny, tmp_path):
    """Calm, with a node's cache: each frame crosses the network once for both ranks. In a storm: the same weights."""
    local = tiny("local", train__steps=24)
    assert run_ranks(2, train, local) == [DONE, DONE]
    env = environment(proxy.port)
    calm = on_s3("calm", data__cache_dir=str(tmp_path / "cache"))
    assert run_ranks(2, in_environment, env, train, calm) == [DONE, DONE]
    assert len(gets(proxy)) == len(Manifest.load(local.data.url).frame_shard)
    proxy.rules = [replace(rule) for rule in FAULTS["everything"] if rule.action != "stall"]
    stormy = on_s3("stormy", data__cache_gib=1e-6)
    assert run_ranks(2, in_environment, env, train, stormy) == [DONE, DONE]
    assert all(rule.count == 0 for rule in proxy.rules)
    assert commit_bytes(local.run) == commit_bytes(calm.run) == commit_bytes(stormy.run)
    assert losses(local.run) == losses(stormy.run)
    assert status(Run.open(stormy.run))["substituted"]["images"] == 0


@pytest.mark.parametrize(("status_code", "cause"), [(503, "503 SlowDown"), (403, "403 AccessDenied")])
def test_an_outage_saves_and_asks_for_another_attempt(proxy, on_s3, tiny, tmp_path, status_code, cause):
    """No image is replaced, whatever the limit, and the run continues where it was."""
    local = tiny("local", train__steps=24)
    assert run_ranks(2, train, local) == [DONE, DONE]
    env = environment(proxy.port)
    changes = {"data__cache_gib": 1e-6, "data__prefetch_gib": 1e-6, "data__max_substituted": 0.9}
    config, away = on_s3("run", data__deadline_seconds=5, **changes), tmp_path / "away"
    ranks = Ranks(2, in_environment, env, train_paused, config, 8, str(away))
    reach(config.run, 7, attempt=1)
    proxy.rules = [Rule("status", status=status_code, method=method) for method in ("GET", "HEAD")]
    away.touch()
    began = time.monotonic()
    assert ranks.results() == [RETRY, RETRY]
    assert time.monotonic() - began < 30
    report = status(Run.open(config.run))
    assert list(losses(config.run)) == list(range(1, report["last_commit"]["step"] + 1))
    assert f"cannot be reached ({cause}, retried for 5 s)" in report["attempts"][0]["why"]
    assert report["substituted"]["images"] == 0 and report["last_commit"]["step"] >= 7
    proxy.rules = []
    assert run_ranks(2, in_environment, env, train, config) == [DONE, DONE]
    assert commit_bytes(config.run) == commit_bytes(local.run)


def test_a_signal_during_an_outage_saves_at_once(proxy, on_s3):
    env = environment(proxy.port)
    changes = {
        "data__cache_gib": 1e-6,
        "data__prefetch_gib": 1e-6,
        "data__deadline_seconds": 400,
    }  # longer than we wait
    config = on_s3("run", train__steps=2000, train__log_every=1000, checkpoint__every_steps=1000, **changes)
    ranks = Ranks(2, in_environment, env, train, config)
    reach(config.run, 7, attempt=1)
    proxy.rules = [Rule("stall")]
    wait("a request that hangs", lambda: proxy.fired)
    time.sleep(0.5)  # and training with it
    began = time.monotonic()
    for rank in range(2):
        ranks.terminate(rank)
    assert ranks.results() == [RETRY, RETRY] and time.monotonic() - began < 20
    attempt = status(Run.open(config.run))["attempts"][0]
    assert attempt["why"].startswith("SIGTERM: saved at step") and attempt["last_step"] >= 7
    assert list(losses(config.run)) == [attempt["last_step"]]  # what was not logged yet is not forgotten


def test_a_frame_that_stays_unreadable_is_replaced(proxy, on_s3, url):
    """One shard has wrong bytes while all others are well: its images are replaced and the run continues."""
    shard = Manifest.load(url).shards[-1].name
    proxy.rules = [Rule("corrupt", path=shard)]
    config = on_s3("run", data__deadline_seconds=5, data__max_substituted=0.2)
    assert run_ranks(2, in_environment, environment(proxy.port), train, config) == [DONE, DONE]
    substituted = status(Run.open(config.run))["substituted"]
    assert substituted["images"] == 40 and "digest" in substituted["causes"][0]


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4))
def test_long_storms(proxy, url, dataset, seed, tmp_path):
    """Nearly every second request meets some fault, for 200 steps, with caches too small to help."""
    rng = random.Random(seed)
    # Wrong bodies come in several forms: the same three times in a row would count as stored.
    actions = ["status", "reset", "drop_reply", "cut", "stall", *3 * ["short", "corrupt"]]
    rng.shuffle(actions)
    proxy.rules = [
        Rule(action, every=every, after=rng.randrange(20_000), path=SHARDS)
        for action, every in zip(actions, (7, 9, 11, 13, 17, 19, 23, 29, 31, 37, 41), strict=True)
    ]
    disk = DiskCache(str(tmp_path / "cache"), 100_000)
    reader = FrameReader(RetryPolicy(deadline=120, attempt=1), disk)
    with (
        loader(plan_of(dataset), steps=range(200)) as expected,
        loader(plan_of(url), steps=range(200), cache_bytes=1, reader=reader) as found,
    ):
        for a, b in zip(expected, found, strict=True):
            assert same(a, b)
    assert len(proxy.fired) > 50
