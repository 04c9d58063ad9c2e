"""Provenance of an attempt: packages, CUDA, driver, GPUs, code. It is recorded at the start; ``Run.claim`` compares it
with the previous attempt's.

A job trains with a copy of the code, which is no git checkout: ``fitv2 submit`` writes ``SOURCE`` into the copy.
"""

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.errors import DataError
from data_sharding.storage import file_digest
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.records import Shape
from fitv2_scale.run.redact import redact

if TYPE_CHECKING:
    import torch

SOURCE = "source.json"  # {"git": "4f0c…-dirty", "diff": "…"} beside the packages of a copy
_PACKAGES = ("torch", "triton", "numpy", "safetensors", "deepspeed", "megatron-core", "flash-attn-4", "fitv2-scale")
_OURS = ("data_sharding", "fitv2_scale", "launchers")
_ROOT = Path(__file__).parents[2]
DRIVER_FILE = Path("/proc/driver/nvidia/version")
_MOST_DIFF = 1 << 20  # characters; a longer one is cut


class _Source(Shape):
    git: str | None
    diff: str


def provenance() -> dict[str, Any]:
    """Of this process, secrets redacted. A sample:

    {"python": "3.11.2", "packages": {"torch": "2.13.0", "deepspeed": null, …}, "cuda": "13.0" or null,
     "nccl": "2.27.7" or null, "driver": "580.65.06" or null, "hostname": "n17", "pid": 4711, "argv": […],
     "git": "4f0c…-dirty" or null, "code": "9a31…", "diff": "diff --git …",
     "gpus": [{"node": "n17", "name": "NVIDIA H100", "uuid": "…"}]}

    ``code`` is a digest of our packages as they are imported; ``diff`` are their changes since the git commit; ``gpus``
    are this node's, in start.json those of all ranks.
    """
    import torch.cuda.nccl  # only here: a report command needs no torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # those that torch cannot use are counted
    gpus = [own_gpu(torch.device("cuda", i)) for i in range(count)]
    return redact(
        {
            "python": sys.version.split()[0],
            "packages": installed(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
            "driver": nvidia_driver(),
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "argv": sys.argv,
            **source(),
            "code": code_digest(),
            "gpus": gpus,
        }
    )


def own_gpu(device: "torch.device") -> dict[str, str] | None:
    """Node, model and UUID of ``device``; None if it is not a GPU."""
    import torch

    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    return {"node": socket.gethostname(), "name": gpu.name, "uuid": str(gpu.uuid)}


def installed() -> dict[str, str | None]:
    """Versions of the packages that results may depend on; None for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def source() -> dict[str, str | None]:
    """{"git": the commit, ending with "-dirty" if tracked files have changes, "diff": those changes}; None and "" if
    this code is not in a git repository."""
    with suppress(OSError, DataError):
        if (written := LocalStore(str(_ROOT)).read_json(SOURCE, _Source)) is not None:
            return written
    here = Path(__file__)
    try:
        _git("ls-files", "--error-unmatch", str(here))  # not the tree around a virtual environment
        state = _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
        return {"git": state, "diff": _git("diff", "HEAD", "--", *_OURS)[:_MOST_DIFF]}
    except (OSError, subprocess.SubprocessError):
        return {"git": None, "diff": ""}


def code_digest() -> str:
    """The digest of our packages as they lie on this machine."""
    return file_digest.code_digest(_ROOT, _OURS)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def nvidia_driver(file: Path = DRIVER_FILE) -> str | None:
    """The version of the NVIDIA driver that the kernel has loaded; None if it has none."""
    with suppress(OSError):
        found = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", file.read_text())
        return found[1] if found else None
    return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(_ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10, errors="replace").stdout
