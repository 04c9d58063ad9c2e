"""What ranks learn of each other when they join."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_sharding.errors import UserError
from fitv2_scale.parallel import rank_facts, world
from fitv2_scale.parallel.agreement import agree
from fitv2_scale.parallel.rank_facts import software_facts
from fitv2_scale.parallel.world import join
from tests.support.fake_cuda import FakeCuda
from tests.support.ranks import run_ranks


def said_by_ranks_of(gpus: Sequence[str | None]) -> str | None:
    """What this rank says when it joins and compares facts; ``gpus`` are the UUIDs of those of the ranks."""
    rank = int(os.environ["RANK"])
    world._gpu = lambda device: (gpus[rank], "0", 0) if gpus[rank] else None
    rank_facts.device_model = lambda device: "NVIDIA H200" if gpus[rank] else "cpu"
    try:
        with join() as joined:
            agree(joined, software_facts(joined.device))
    except UserError as error:
        return error.said_by(rank)
    return "nothing"


def test_two_ranks_with_one_gpu_are_refused():
    first, *others = run_ranks(3, said_by_ranks_of, ["a", "b", "a"])
    assert others == [None, None]
    assert first.startswith("ranks 0, 2 (") and first.endswith(
        ") would share a GPU: start a rank for each GPU, not more"
    )


def test_a_node_without_its_gpu_is_refused():
    """Its driver is broken, say; a CPU would wait for the others in another collective than they for it."""
    first, *others = run_ranks(3, said_by_ranks_of, ["a", None, "b"])
    assert others == [None, None]
    assert first.startswith('the ranks were not told the same: device is "NVIDIA H200" on ranks 0, 2 (')
    assert ' and "cpu" on rank 1 (' in first
    assert run_ranks(2, said_by_ranks_of, [None, None]) == ["nothing"] * 2


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_rank_lacks_all_of_them_raise(size):
    *others, last = run_ranks(size, lacking_a_gpu, size - 1)
    assert last == "no GPU" and all(said.endswith(": no GPU") and "rank 1 on " in said for said in others)


def lacking_a_gpu(which: int) -> str | None:
    rank = int(os.environ["RANK"])
    world.own_device = lambda: (torch.device("cpu"), UserError("no GPU") if rank == which else None)
    try:
        with join():
            return "joined"
    except UserError as error:
        return error.said_by(rank)


def joined_with(gpus: int, driver: bool, variables: list[dict[str, str]], folder: str) -> tuple[str, str, str, bool]:
    """With the variables of this rank, on a machine with GPUs: what this rank says, its device, its backend, and
    whether CUDA has begun with GPUs that it sees."""
    rank, backends, warned = int(os.environ["RANK"]), [], []
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ |= variables[rank]
    cuda = FakeCuda(gpus, driver).install(Path(tempfile.mkdtemp(dir=folder)))
    torch.cuda.set_device = lambda device: None
    begin = dist.init_process_group
    dist.init_process_group = lambda backend, **k: (backends.append(backend), begin("gloo", **k))  # nccl is not here
    world._gpu = lambda device: None if device.type == "cpu" else (os.environ.get("CUDA_VISIBLE_DEVICES"), device.index)
    world.log.addFilter(lambda record: warned.append(record.getMessage()))
    if "CUDA_HAS_BEGUN" in os.environ:  # as in a program that asks before it joins
        torch.cuda.is_available()
    try:
        with join() as joined:
            found = joined.device
            assert joined.all_gather(rank) == list(range(joined.size))
    except UserError as error:
        warned, found = [error.said_by(rank) or ""], None
    return "".join(warned), str(found), backends[0], bool(cuda.begun)


ON_CPU = ("", "cpu", "gloo", False)
ON_FIRST, ON_SECOND = (("", f"cuda:{n}", "cpu:gloo,cuda:nccl", True) for n in range(2))


@pytest.mark.parametrize(
    "variables,gpus",
    [
        ({}, "2 GPUs"),
        ({"LOCAL_WORLD_SIZE": "3"}, "2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "1", "LOCAL_RANK": "0"}, "1 GPU"),  # as where a shell shows one of the two
    ],
    ids=str,
)
def test_one_machine_with_fewer_gpus_than_ranks_computes_on_the_cpu(variables, gpus, tmp_path):
    (said, *first), *others = run_ranks(3, joined_with, 2, True, [variables] * 3, str(tmp_path))
    assert ("", *first) == ON_CPU and others == [ON_CPU] * 2
    assert said.startswith(f"this machine has {gpus} for 3 ranks: all compute on the CPU; ")


def test_they_do_so_where_it_is_too_late_to_hide_the_gpus(tmp_path):
    found = run_ranks(2, joined_with, 1, True, [{"CUDA_HAS_BEGUN": "yes"}] * 2, str(tmp_path))
    assert [one[1:3] for one in found] == [("cpu", "gloo")] * 2


def called_while_joining() -> list[str]:
    called = []
    for name in ("own_device", "call_roll"):
        act = getattr(world, name)
        setattr(world, name, lambda *args, act=act, name=name: (called.append(name), act(*args))[1])
    with join():
        return called


def test_a_rank_whose_gpu_hangs_has_not_joined():
    """So that the others name it."""
    assert run_ranks(2, called_while_joining) == [["own_device", "call_roll"]] * 2


def test_a_torch_without_cuda_says_that_it_does_not_use_the_gpu(tmp_path, monkeypatch, caplog):
    FakeCuda(0).install(tmp_path, monkeypatch.setattr)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with join() as joined:
        assert joined.device.type == "cpu"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "is built without CUDA, so it computes on the CPU though this machine has an NVIDIA GPU:" in said


def test_ranks_that_have_a_gpu_each_use_them(tmp_path):
    own = [{"CUDA_VISIBLE_DEVICES": str(n), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"} for n in range(2)]
    assert run_ranks(2, joined_with, 2, True, own, str(tmp_path)) == [ON_FIRST] * 2
    assert run_ranks(2, joined_with, 2, True, [{}, {}], str(tmp_path)) == [ON_FIRST, ON_SECOND]


def test_more_ranks_than_gpus_stay_refused_on_several_nodes_and_in_a_job(tmp_path):
    for variables in ({"SLURM_JOB_ID": "7"}, {"LOCAL_WORLD_SIZE": "2"}):
        first, second, third = (
            found[0] for found in run_ranks(3, joined_with, 2, True, [variables] * 3, str(tmp_path))
        )
        assert third == "rank 2 of its node sees 2 GPUs: start a rank for each GPU, not more"
        assert first.startswith("rank 2 on ") and first.endswith(third) and second == ""


def test_ranks_of_one_gpu_stay_refused_where_there_are_enough(tmp_path):
    one = [{"LOCAL_RANK": "0"}] * 2
    first, second = (found[0] for found in run_ranks(2, joined_with, 2, True, one, str(tmp_path)))
    assert second == "" and first.endswith("would share a GPU: start a rank for each GPU, not more")


def test_a_driver_that_torch_cannot_use_is_said_where_it_is(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    first, second = (found[0] for found in run_ranks(2, joined_with, 2, False, [hidden, {}], str(tmp_path)))
    assert "whose NVIDIA driver is 470.82.01: CUDA says" in second
    assert first.startswith("rank 1 on ") and first.endswith(f": {second}")
    assert run_ranks(2, joined_with, 2, False, [hidden] * 2, str(tmp_path)) == [ON_CPU] * 2


def gathered() -> tuple[list, list]:
    """Twice, of values of several sizes; that of rank 1 is None."""
    with join() as joined:
        values = [None if joined.rank == 1 else [joined.rank] * 10**n for n in (0, 5)]
        first, second = map(joined.gather, values)
        return first, second


def test_rank_0_gathers_the_values_of_all():
    (first, second), *others = run_ranks(4, gathered)
    assert first == [[0], None, [2], [3]]
    assert second == [[0] * 10**5, None, [2] * 10**5, [3] * 10**5]
    assert others == [([], [])] * 3
    assert run_ranks(1, gathered) == [([[0]], [[0] * 10**5])]


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "changed,sentence",
    [
        ({"MASTER_PORT": None}, "RANK is 0, WORLD_SIZE is 2, MASTER_PORT is not set: start ranks with torchrun, srun"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2: ranks are numbered from 0 to WORLD_SIZE - 1"),
        ({"RANK": None}, "WORLD_SIZE is 2, RANK is not set: start ranks with torchrun, srun or mpirun, or set"),
        ({"LOCAL_RANK": "abc"}, r"RANK is 0, WORLD_SIZE is 2, LOCAL_RANK is 'abc' \(not a whole number from 0\):"),
    ],
)
def test_a_rank_that_cannot_be_joins_nothing(monkeypatch, changed, sentence):
    """It would wait for minutes for ranks that do not exist, or end in a traceback."""
    for name, value in (WHOLE | changed).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{sentence}"), join():
        raise AssertionError("it joined")
