"""Saves that are killed, suspended, starved of disk or cut off from S3: what counts is whole, nothing whole is lost.

On local disk and on a real S3 server.
"""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from dying import Doom, watch_disk, watch_s3
from lineage import commit_bytes
from ranks import Ranks, run_ranks
from services.faultproxy import FaultProxy, Rule
from services.rgw import environment
from services.s3 import use
from state import State, opened, recover, saver
from waiting import wait

from data_sharding.patience import Patience
from fitv2_scale import s3_store
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.run import Run
from fitv2_scale.run_log import StaleAttempt
from fitv2_scale.run_status import status
from fitv2_scale.train import DONE, RETRY, train

BUCKET = "faults"
S3 = pytest.param("s3", marks=pytest.mark.services)
PART = 100 << 10  # bytes of an S3 upload's part, so that a save of 240 kB is several
AT_ONCE = 4  # groups of ranks, of which most wait for the storage


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    """``place("local")`` or ``place("s3")``: (environment, a function that makes URLs)."""

    def make(kind: str):
        if kind == "local":
            return {}, lambda name: str(tmp_path / name)
        rgw, client = request.getfixturevalue("rgw"), request.getfixturevalue("client")
        if BUCKET not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        use(monkeypatch, rgw.environment)
        return rgw.environment, lambda name: f"s3://{BUCKET}/{tmp_path.name}/{name}"

    return make


# ---- killed ----


def doomed_save(env, url: str, at: int | None) -> int:
    """Saves steps 2 to 4, the last of which retires step 2, and dies in step 4 at operation ``at``."""
    doom = Doom()
    watch_s3(doom, reads=False) if env else watch_disk(doom)
    s3_store.PART = PART
    with opened(env, url) as (world, run):
        save = saver(world, run)
        for step in (2, 3):
            assert save(step) is None
        doom.arm(at)
        assert save(4) is None
        return doom.count


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["local", S3])
def test_killed_at_every_boundary_of_a_save(place, kind):
    """Each file, the manifest, COMMIT, retention: before each operation that changes something, and amid each write."""
    env, url = place(kind)
    (operations,) = run_ranks(1, doomed_save, env, url("all"), None)
    assert operations >= (30 if kind == "local" else 10)
    runs = [url(str(at)) for at in range(operations)]
    for several in batched(range(operations), AT_ONCE):
        for doomed in [Ranks(1, doomed_save, env, runs[at], at) for at in several]:
            with pytest.raises(RuntimeError, match="died without a word"):
                doomed.results()
    (found,) = run_ranks(1, recover, env, *runs)
    for at, after in enumerate(found):
        assert not after["problems"] and not after["passed_over"], f"at operation {at}: {after}"
        assert after["step"] == max(after["commits"])
    outcomes = [after["step"] for after in found]
    assert outcomes == sorted(outcomes) and set(outcomes) == {3, 4}  # one moment from which on the new commit counts


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[at : at + size] for at in range(0, len(items), size))


def save_for_ever(env, url: str) -> None:
    s3_store.PART = PART
    with opened(env, url) as (world, run):
        save, state = saver(world, run), State(-1, world)
        if commits := run.log.commits():
            newest = commits[-1].fields["step"]
            restored = Checkpointer(run, None, 0, world).restore(state, run)
            assert restored.step == newest and not restored.quarantined and state.is_whole(newest)
            state.step = newest
        for step in range(state.step + 1, 10**6):
            assert save(step) is None


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["local", S3])
def test_killed_at_random_moments(place, kind, kills):
    """Two ranks that do nothing but save, killed and started again: each time the newest commit is whole."""
    env, url = place(kind)
    run, rng = url("run"), random.Random(0)
    Run.open_or_create(run, {}, {}, None)
    for attempt in range(1, kills + 1):
        ranks = Ranks(2, save_for_ever, env, run)
        wait("a commit", lambda n=attempt: n in [e.attempt for e in Run.open(run).log.entries() if e.kind == "COMMIT"])
        with pytest.raises(AssertionError, match="hang"):  # unless a rank met something wrong
            ranks.results(timeout=rng.uniform(0, 0.3))
    ((found,),) = run_ranks(1, recover, env, run)
    assert not found["problems"] and found["step"] > 0


# ---- suspended ----


def suspended_save(env, url: str, at: int | None) -> str | int:
    """As ``doomed_save``, but suspended instead of killed; says how it went on."""
    doom = Doom(signal.SIGSTOP)
    watch_s3(doom, reads=True) if env else watch_disk(doom)
    s3_store.PART = PART
    with opened(env, url) as (world, run):
        save = saver(world, run)
        for step in (2, 3):
            assert save(step) is None
        doom.arm(at)
        try:
            assert save(4) is None
        except StaleAttempt:
            return "stale"
        return doom.count if at is None else "saved"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("races", [4, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["local", S3])
def test_a_suspended_attempt_that_wakes_up_harms_nothing(place, kind, races):
    """It stops anywhere in its save; another attempt claims the run and saves; it wakes up."""
    env, url = place(kind)
    (operations,) = run_ranks(1, suspended_save, env, url("all"), None)
    moments = [0, *random.Random(races).choices(range(operations), k=races - 1)]  # 0: certainly stale
    runs = [url(str(race)) for race in range(races)]
    for several in batched(range(races), AT_ONCE):
        old = [Ranks(1, suspended_save, env, runs[race], moments[race]) for race in several]
        for ranks in old:
            ranks.wait_until_stopped(0)
        before = [Run.open(runs[race]).log.entries() for race in several]
        run_ranks(1, save_next, env, *(runs[race] for race in several))
        for ranks in old:
            ranks.signal(0, signal.SIGCONT)
        for race, ranks, entries in zip(several, old, before, strict=True):
            (end,) = ranks.results()
            after = Run.open(runs[race]).log.entries()
            claim = next(e.n for e in after if e.kind == "CLAIM" and e.attempt == 2)
            assert all(e.attempt == 2 for e in after[claim - 1 :]), "the old attempt wrote behind the new one's claim"
            assert [e.n for e in entries] == list(range(1, claim))
            assert end == "stale" or any(e.kind == "COMMIT" and e.fields["step"] == 4 for e in entries)
            assert end == "stale" or moments[race] > 0
    (found,) = run_ranks(1, recover, env, *runs)
    assert len(found) == races
    for after in found:
        assert after["step"] == 11 and not after["problems"] and not after["passed_over"]


def save_next(env, *urls: str) -> None:
    for url in urls:
        with opened(env, url) as (world, run):
            save = saver(world, run)
            for step in (10, 11):
                assert save(step) is None


# ---- S3 on bad days ----

SECOND = r"steps/00000002"
LOG = r"/log/"
WRITES = ("PUT", "POST")


def rules(action: str, count: int | None = 2, path: str = "", **kw) -> list[Rule]:
    return [Rule(action, count=count, path=path, method=method, **kw) for method in WRITES]


HEALING = {
    "503": rules("status", count=4, path=SECOND),
    "500": rules("status", count=4, path=SECOND, status=500),
    "reset": rules("reset", count=4, path=SECOND),
    "cut": rules("cut", count=2, path=SECOND),
    "stall": rules("stall", count=1, path=SECOND),
    "lost replies": rules("drop_reply", count=2, path=SECOND),
    "lost replies of the log": [Rule("drop_reply", count=4, method="PUT", path=LOG)],
    "503 of the log": [Rule("status", count=4, method=m, path=LOG) for m in ("PUT", "GET")],
    "cut and stalled reads": [
        Rule("cut", count=2, after=5, path=LOG, skip=1),
        Rule("stall", count=2, after=5, path=r"steps/.*safetensors"),
        Rule("cut", count=4, after=100_000, path=r"steps/.*safetensors"),
    ],
    "corrupt reads": [
        Rule("corrupt", count=1, after=n, path=r"steps/.*safetensors") for n in (10, 2_000, 3_000, 100_000)
    ],
    "credentials that come and go": [*rules("status", count=3, path=SECOND, status=403)],
}


ROWS = 60  # 144 kB a rank


def three_saves(env, url: str, deadline: float) -> list[str | None]:
    """Saves steps 1, 2, 3, from two ranks, in several parts each; then restores."""
    s3_store.PART = PART
    with opened(env, url, Patience(deadline, attempt=3)) as (world, run):
        save = saver(world, run, keep_last=3)
        said = [save(step, rows=ROWS) for step in (1, 2, 3)]
        state = State(-1, world, ROWS)
        restored = Checkpointer(run, None, 0, world).restore(state, run)
        assert restored.step == 3 and not restored.quarantined and state.is_whole(3)
        return said


@pytest.fixture
def proxied(request, place, rgw, monkeypatch):
    """(proxy, its environment, a function that makes URLs): all S3 goes through the proxy."""
    _, url = place("s3")
    with FaultProxy(rgw.port) as proxy:
        use(monkeypatch, environment(proxy.port))
        yield proxy, environment(proxy.port), url


@pytest.mark.services
@pytest.mark.parametrize("fault", HEALING)
def test_what_heals_is_survived(proxied, fault):
    proxy, env, url = proxied
    proxy.rules = [replace(rule) for rule in HEALING[fault]]
    assert run_ranks(2, three_saves, env, url("run"), 60.0) == [[None, None, None]] * 2
    assert all(rule.count == 0 for rule in proxy.rules), f"not all faults fired: {proxy.rules}"
    assert [e.fields["step"] for e in Run.open(url("run")).log.commits()] == [1, 2, 3]
    ((found,),) = run_ranks(1, partial(recover, rows=ROWS), env, url("run"))
    assert found["step"] == 3 and not found["problems"]


@pytest.mark.services
@pytest.mark.parametrize(
    "part,action",
    [("data", a) for a in ("status", "reset", "cut", "stall")]
    + [("manifest", a) for a in ("status", "drop_reply")]
    + [("COMMIT", "status")],
)
def test_a_save_fails_whole_and_the_next_one_works(proxied, action, part):
    """What does not heal within the deadline costs one save, said on all ranks alike."""
    proxy, env, url = proxied
    path = {"data": SECOND + r".*rank-00001", "manifest": SECOND + r".*manifest", "COMMIT": r"/log/00000003"}[part]
    methods = ("PUT", "GET") if part == "COMMIT" else ("PUT", "POST", *(["GET", "HEAD"] if action != "status" else []))
    count = 8 if part == "COMMIT" else None  # the next save needs that number of the log too
    proxy.rules = [Rule(action, path=path, method=m, count=count) for m in methods]
    said = run_ranks(2, three_saves, env, url("run"), 4.0)
    assert said[0] == said[1]
    steps = [e.fields["step"] for e in Run.open(url("run")).log.commits()]
    if said[0][1] is None:
        assert part == "COMMIT" and steps == [1, 2, 3]
    else:
        assert said[0][0] is None and said[0][2] is None and "the save at step 2 failed" in said[0][1]
        assert steps == [1, 3]
    proxy.rules = []
    ((found,),) = run_ranks(1, partial(recover, rows=ROWS), env, url("run"))
    assert found["step"] == 3 and not found["problems"]


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Takes all space but ``leave`` bytes."""
    ballast, free = folder / "ballast", os.statvfs(folder)
    with open(ballast, "wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return ballast


def saves_on_a_full_disk(folder: str, leave: int) -> list:
    with opened({}, f"{folder}/run") as (world, run):
        save, said = saver(world, run), []
        said.append(save(1, rows=100))
        ballast = world.on_first(lambda: fill(Path(folder), leave))
        said += [save(2, rows=100), save(3, rows=100)]
        world.on_first(ballast.unlink)
        return [*said, save(4, rows=100)]


@pytest.mark.parametrize("leave", [0, 4096, 100_000, 400_000])
def test_a_full_disk_costs_saves_and_nothing_else(small_disk, leave):
    """480 kB a save: the space ends before, in the first or in the second rank's file."""
    first, second = run_ranks(2, saves_on_a_full_disk, str(small_disk), leave)
    assert first == second and first[0] is None and first[3] is None
    assert all("No space left on device" in said for said in first[1:3])
    assert len(list((small_disk / "run" / "steps").iterdir())) == 2  # what the failed ones had taken is free again
    ((found,),) = run_ranks(1, partial(recover, rows=100), {}, str(small_disk / "run"))
    assert found["step"] == 4 and not found["problems"] and found["commits"] == [1, 4]


def train_on_a_full_disk(config, folder: str, full: tuple[int, int]) -> int:
    """The disk is full from the save after step ``full[0]`` until that after ``full[1]``."""
    from fitv2_scale.session import Session

    save = Session.save

    def act(self, step, begin, last, totals):
        if step in full and begin:
            failed = self._settle()  # of the save before, which met the disk as it was
            self.world.on_first(lambda: fill(Path(folder), 0) and None if step == full[0] else ballast.unlink())
            return save(self, step, begin, last, totals) or failed
        return save(self, step, begin, last, totals)

    ballast = Path(folder, "ballast")
    Session.save = act
    return train(config)


def test_training_goes_on_while_the_disk_is_full(tiny, small_disk):
    undisturbed = tiny("undisturbed", train__steps=12)
    assert run_ranks(2, train, undisturbed) == [DONE, DONE]
    changes = {"train__steps": 12, "checkpoint__every_steps": 2, "train__audit": False}
    config = tiny("run", run=str(small_disk / "run"), **changes)
    assert run_ranks(2, train_on_a_full_disk, config, str(small_disk), (4, 8)) == [DONE, DONE]
    assert commit_bytes(config.run) == commit_bytes(undisturbed.run)
    from fitv2_scale.tracking.journal import read

    records = [(r.step, r.metrics) for r in read(Run.open(config.run))]
    assert [s for s, m in records if "loss" in m] == list(range(1, 13))  # the journal waited for its disk
    assert [(s, m["failed_saves"]) for s, m in records if "failed_saves" in m] == [(4, 1), (6, 2)]

    # Full for good: three saves are tried, then another attempt is asked for, on another node perhaps.
    shutil.rmtree(config.run)  # the disk has room for one run
    config = tiny("run", run=str(small_disk / "other"), **changes)
    assert run_ranks(2, train_on_a_full_disk, config, str(small_disk), (4, 99)) == [RETRY, RETRY]
    Path(small_disk, "ballast").unlink()
    assert run_ranks(2, train, config) == [DONE, DONE]
    assert commit_bytes(config.run) == commit_bytes(undisturbed.run)
    assert [a["last_step"] for a in status(Run.open(config.run))["attempts"]] == [2, 12]
