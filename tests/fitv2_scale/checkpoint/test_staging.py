"""The copy of the state that a save writes: of one moment, in the same memory, on the rank's own device."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fitv2_scale.checkpoint.staging import Staging
from fitv2_scale.parallel.boxes import Box, LogicalTensor
from tests.support.checkpoint_state import opened, saver
from tests.support.ranks import run_ranks


def late(function: Callable[[], None]) -> Callable[[], None]:
    def act() -> None:
        time.sleep(0.05)
        function()

    return act


def state(device: str = "cpu") -> tuple[list[torch.Tensor], dict[str, LogicalTensor]]:
    """Two tensors, of which the second is held as two boxes, one of them strided."""
    a, b = torch.randn(5, 7, device=device), torch.randn(4, 6, device=device)
    boxes = [Box((0, 0), b[:, :2]), Box((0, 2), b[:, 2:])]
    return [a, b], {"a": LogicalTensor((5, 7), [Box((0, 0), a)]), "b": LogicalTensor((4, 6), boxes), "none": empty()}


def empty() -> LogicalTensor:
    return LogicalTensor((3,), [])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_copy_is_of_the_moment_that_was_marked(device):
    """In the same memory each time; what is computed before counts, what comes after ``wait`` does not."""
    tensors, live = state(device)
    staging = Staging(live)
    memory = [box.tensor.data_ptr() for t in staging.tensors.values() for box in t.boxes]
    staging.wait()  # there is nothing to wait for
    for _ in range(3):
        for tensor in tensors:
            for _ in range(50):
                tensor.add_(1)
        staging.mark(live)
        copying = threading.Thread(target=late(staging.copy))
        copying.start()
        staging.wait()
        expected = [tensor.cpu().clone() for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()
        copying.join()
        (a,), (left, right) = ([box.tensor for box in staging.tensors[name].boxes] for name in "ab")
        assert torch.equal(a, expected[0]) and torch.equal(torch.cat([left, right], 1), expected[1])
    assert memory == [box.tensor.data_ptr() for t in staging.tensors.values() for box in t.boxes]
    assert staging.bytes == 4 * (5 * 7 + 4 * 6) and staging.tensors["none"] == empty()


def test_a_copy_that_fails_holds_up_nobody():
    tensors, live = state()
    staging = Staging(live)
    staging.mark(live)
    staging._live = [*staging._live[:-1], torch.zeros(1, 99)]
    with pytest.raises(RuntimeError):
        staging.copy()
    staging.wait()


def save_as_a_rank_on_gpu_3(url: str) -> list[tuple[str, torch.device]]:
    """The device that each thread of a save makes its own; there is none."""
    with opened({}, url) as (world, run):
        chosen = []
        torch.cuda.set_device = lambda device: chosen.append((threading.current_thread().name, device))
        assert saver(replace(world, device=torch.device("cuda", 3)), run)(1) is None
        return chosen


def test_the_thread_that_saves_stays_on_the_gpu_of_its_rank(tmp_path):
    (chosen,) = run_ranks(1, save_as_a_rank_on_gpu_3, str(tmp_path / "run"))
    assert chosen == [("save", torch.device("cuda", 3))]
