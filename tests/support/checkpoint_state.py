"""State to save without an engine that has it: which step it is at says every number of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from data_sharding.plan.plan import Cursor
from data_sharding.storage.filesystems import disconnect
from data_sharding.storage.retry import RetryPolicy
from data_sharding.storage.s3_store import S3Store
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.cleanup import leftovers, remove
from fitv2_scale.checkpoint.commit import verify_commit
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.parallel.boxes import Box, LogicalTensor
from fitv2_scale.parallel.state_copy import StateCopy
from fitv2_scale.parallel.world import World, join
from fitv2_scale.run.log import RunLog
from fitv2_scale.run.run import Attempt, Run

CURSOR = Cursor("plan", 0, [[0, 1, [1]]], [0], 0, [0])


class State:
    """What ``Checkpointer`` needs of an engine. Rows of each tensor are split over the ranks, unevenly."""

    def __init__(self, step: int, world: World, rows: int = 50) -> None:
        self.shapes = {"param/w": (rows, 1200), "param/b": (7,), "exp_avg/b": (7,), "exp_avg_sq/b": (7,), "ema/b": (7,)}
        self.step = step
        self.copy = StateCopy(shard=world.rank)
        self._world = world
        self.tensors = {name: self._mine(tensor).clone() for name, tensor in self.expected(step).items()}

    def move_to(self, step: int) -> None:
        """Becomes the state of ``step``, in the same memory."""
        self.step = step
        for name, tensor in self.expected(step).items():
            self.tensors[name].copy_(self._mine(tensor))

    def expected(self, step: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(step)
        return {name: torch.randn(shape, generator=rng) for name, shape in self.shapes.items()}

    def _mine(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.tensor_split(self._world.size)[self._world.rank]

    def boxes(self) -> dict[str, LogicalTensor]:
        found = {}
        for name, shape in self.shapes.items():
            first = sum(len(part) for part in torch.empty(shape).tensor_split(self._world.size)[: self._world.rank])
            found[name] = LogicalTensor(shape, [Box((first, *[0] * (len(shape) - 1)), self.tensors[name])])
        return found

    def scalars(self) -> dict[str, float]:
        return {"step": float(self.step)}

    def derived(self) -> dict[str, float]:
        return {}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        self.step = int(scalars["step"])

    def loaded(self) -> None: ...

    def is_whole(self, step: int) -> bool:
        """Bit for bit what was saved at ``step``."""
        expected = self.expected(step)
        same = all(torch.equal(self._mine(expected[name]), tensor) for name, tensor in self.tensors.items())
        return same and self.step == step


@contextmanager
def opened(env: dict[str, str], url: str, policy: RetryPolicy | None = None) -> Iterator[tuple[World, Run]]:
    """In a rank: the run at ``url``, made if it is not there, with requests as patient as that."""
    os.environ.update(env)
    disconnect()
    with join() as world:
        world.run_on_rank0(lambda: Run.open_or_create(url, {}, {}, None) and None)
        run = Run.open(url)
        if policy is not None:
            store = S3Store(url, policy)
            run = replace(run, store=store, log=RunLog(store))
        yield world, run


def saver(world: World, run: Run, kind: type[State] = State, rows: int = 50, **config) -> Callable[[int], str | None]:
    """``save(step)`` of a new attempt, for states of class ``kind``."""
    attempt = Attempt(world.run_on_rank0(lambda: run.claim({}).number), run)
    state = kind(0, world, rows)
    checkpoints = Checkpointer(state, attempt, world, CheckpointConfig(**config))

    def save(step: int) -> str | None:
        state.move_to(step)
        return checkpoints.save(step, CURSOR)

    return save


def recover(env: dict[str, str], *urls: str, rows: int = 50) -> list[dict]:
    """What a new attempt finds in each run, and that all is well with it afterwards. One rank."""
    return [_recover(env, url, rows) for url in urls]


def _recover(env: dict[str, str], url: str, rows: int) -> dict:
    with opened(env, url) as (world, run):
        save = saver(world, run, rows=rows)
        state = State(-1, world, rows)
        problems = {e.fields["step"]: verify_commit(run, e) for e in run.log.commits()}
        restored = restore(state, run, world)
        assert restored is not None, "nothing was restored"
        assert state.is_whole(restored.step), "what was restored is not what was saved"
        assert save(1000) is None
        remove(run, leftovers(run))
        committed = {e.fields["path"] for e in run.log.commits()}
        there = {"/".join(path.split("/")[:2]) for path in run.store.list("steps/")}
        there |= {"/".join(path.split("/")[:2]) for path, _ in run.store.uploads() if path.startswith("steps/")}
        assert there == committed, "something is left over, or was lost"
        found = {"step": restored.step, "problems": {s: p for s, p in problems.items() if p}, "commits": list(problems)}
        return found | {"passed_over": restored.quarantined}
