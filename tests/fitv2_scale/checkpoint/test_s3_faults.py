"""Saves to an S3 server on bad days: what heals is survived, what does not costs one save and nothing else."""

from dataclasses import replace
from functools import partial

import pytest

from data_sharding.storage import s3_store
from data_sharding.storage.retry import RetryPolicy
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.run.run import Run
from tests.services.faultproxy import FaultProxy, Rule
from tests.services.rgw import environment
from tests.services.s3 import use
from tests.support.checkpoint_state import State, opened, recover, saver
from tests.support.ranks import run_ranks
from tests.support.run_locations import PART

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
    with opened(env, url, RetryPolicy(deadline, attempt=3)) as (world, run):
        save = saver(world, run, rows=ROWS, keep_last=3)
        said = [save(step) for step in (1, 2, 3)]
        state = State(-1, world, ROWS)
        restored = restore(state, run, world)
        assert restored.step == 3 and not restored.quarantined and state.is_whole(3)
        return said


@pytest.fixture
def proxied(request, location, rgw, monkeypatch):
    """(proxy, its environment, a function that makes URLs): all S3 goes through the proxy."""
    _, url = location("s3")
    with FaultProxy(rgw.port) as proxy:
        use(monkeypatch, environment(proxy.port))
        yield proxy, environment(proxy.port), url


@pytest.mark.s3
@pytest.mark.parametrize("fault", HEALING)
def test_what_heals_is_survived(proxied, fault):
    proxy, env, url = proxied
    proxy.rules = [replace(rule) for rule in HEALING[fault]]
    assert run_ranks(2, three_saves, env, url("run"), 60.0) == [[None, None, None]] * 2
    assert all(rule.count == 0 for rule in proxy.rules), f"not all faults fired: {proxy.rules}"
    assert [e.fields["step"] for e in Run.open(url("run")).log.commits()] == [1, 2, 3]
    ((found,),) = run_ranks(1, partial(recover, rows=ROWS), env, url("run"))
    assert found["step"] == 3 and not found["problems"]


@pytest.mark.s3
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
