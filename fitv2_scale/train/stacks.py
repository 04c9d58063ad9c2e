"""What a rank is doing, for a person: the stacks of its threads and its last collectives."""

import faulthandler
from collections.abc import Callable
from contextlib import suppress

import torch

from fitv2_scale.run.run import Attempt


def write_stacks(attempt: Attempt, rank: int, device: torch.device) -> None:
    """Writes attempts/<n>/logs/rank-00000.stacks, and beside it torch's flight recorder; what fails is left out."""
    run, name = attempt.run, f"{attempt.path}/logs/rank-{rank:05d}"
    with suppress(Exception):
        file = run.local_path(f"{name}.stacks")
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
        run.upload(f"{name}.stacks")
    with suppress(Exception):  # this part of torch is private
        for library, dump in _flight_recorders(device):
            run.local_path(f"{name}.{library}.json").write_bytes(dump())
            run.upload(f"{name}.{library}.json")


def _flight_recorders(device: torch.device) -> list[tuple[str, Callable[[], bytes]]]:
    """This rank's last collectives as torch has recorded them: NCCL's if it computes on a GPU, else gloo's."""
    on_gpu = device.type == "cuda"
    name, program = ("nccl", "_dump_nccl_trace_json") if on_gpu else ("gloo", "_dump_fr_trace_json")
    from torch._C import _distributed_c10d  # not in every build of torch

    dump = getattr(_distributed_c10d, program, None)
    return [(name, dump)] if dump else []
