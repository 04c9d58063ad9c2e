"""Which device a rank computes on: a GPU of its own; or the CPU, where there is none or one machine has too few.

What a driver or a launcher has broken is refused: a run that falls back to the CPU unnoticed takes months.
"""

import json
import os
import re
import socket
from pathlib import Path

import torch

from data_sharding.errors import UserError
from fitv2_scale.run.provenance import DRIVER_FILE, nvidia_driver

_FIRST_GPU = Path("/dev/nvidia0")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_IN_JOB = "SLURM_JOB_ID"
_CPU = torch.device("cpu")


def gpu_view() -> str:
    """What this rank sees of GPUs and ranks of its machine. Ranks that see the same give the same text."""
    seen = os.environ.get(_VISIBLE), torch.cuda.device_count()  # asks NVML: CUDA begins later, or never
    return json.dumps([socket.gethostname(), *seen, os.environ.get("LOCAL_WORLD_SIZE"), _IN_JOB in os.environ])


def sees_too_few_gpus(size: int) -> bool:
    """Whether this rank sees GPUs, but fewer than all ``size`` ranks, which are on its machine, outside of Slurm.

    On several nodes, or in a job of Slurm, GPUs that are missing are a fault, which ``own_device`` finds.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return local == size and 0 < torch.cuda.device_count() < size and _IN_JOB not in os.environ


def hide_gpus(size: int) -> str:
    """Hides the GPUs from this process, before CUDA begins. Returns a sentence that says why. For ranks of which all
    ``sees_too_few_gpus``, and all see the same (``gpu_view``): else each has been given its own."""
    gpus = torch.cuda.device_count()
    os.environ[_VISIBLE] = ""
    return (
        f"this machine has {_gpus(gpus)} for {size} ranks: all compute on the CPU; start one rank for each GPU to use "
        f"{'it' if gpus == 1 else 'them'}"
    )


def own_device() -> tuple[torch.device, UserError | None]:
    """This rank's device; or the CPU, and why this rank has no GPU though its node has some."""
    if not torch.cuda.is_available():
        return _CPU, None
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        return _CPU, UserError(f"rank {local} of its node sees {_gpus(gpus)}: start a rank for each GPU, not more")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device, None


def device_model(device: torch.device) -> str:
    """The name of a GPU's model, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def unusable_gpu() -> UserError | None:
    """Why torch, which is built for CUDA, cannot use this machine's NVIDIA GPUs; None if it can, if there are none, or
    if they are hidden from it."""
    if torch.version.cuda is None or not _shows_nvidia_gpus() or torch.cuda.is_available():
        return None
    driver = nvidia_driver(DRIVER_FILE) or "of unknown version"
    return UserError(
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and cannot use the GPUs of this machine, "
        f'whose NVIDIA driver is {driver}: CUDA says "{_refusal()}"; install a newer driver or a torch for an older '
        "CUDA, see that the container or job may use the GPUs, or set "
        f'{_VISIBLE}="" to compute on the CPU'
    )


def torch_without_cuda() -> str | None:
    """A sentence if this machine has NVIDIA GPUs, and torch is built without CUDA."""
    if torch.version.cuda is not None or not _shows_nvidia_gpus():
        return None
    return (
        f"torch {torch.__version__} is built without CUDA, so it computes on the CPU though this machine has an NVIDIA "
        f'GPU: install a CUDA build of torch to use it, or set {_VISIBLE}="" to say that the CPU is meant'
    )


def _shows_nvidia_gpus() -> bool:
    """Whether the machine has any, and does not hide them: "", -1 or, from Slurm, NoDevFiles."""
    shown = re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get(_VISIBLE, "0"))
    return bool(shown) and (DRIVER_FILE.exists() or _FIRST_GPU.exists())


def _refusal() -> str:
    """What CUDA says, without its advice."""
    try:
        torch.cuda.init()
    except Exception as error:
        numbered = re.search(r"Error \d+: [^\n.]*", str(error))
        return numbered[0] if numbered else str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    return "no reason"


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"
