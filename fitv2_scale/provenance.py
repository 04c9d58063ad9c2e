"""What a process is made of: for the records of an attempt, and to compare nodes."""

import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fitv2_scale.redact import redact

_PACKAGES = ("torch", "numpy", "safetensors", "fitv2-scale")


def provenance() -> dict[str, Any]:
    """What this process is made of: interpreter, packages, host, command line, code version, GPUs. Secrets hidden."""
    import torch  # only here: a report command needs no torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return redact(
        {
            "python": sys.version.split()[0],
            "packages": installed(),
            "cuda": torch.version.cuda,
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "argv": sys.argv,
            "git": _git_state(),
            "gpus": [{"name": gpu.name, "uuid": str(gpu.uuid)} for gpu in gpus],
        }
    )


def installed() -> dict[str, str | None]:
    """Versions of the packages that results may depend on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """The commit of this source tree, with "-dirty" behind it if tracked files were changed; None if it has none."""
    here = Path(__file__)
    tracked = ["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name]  # not the tree around a venv
    describe = ["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        return subprocess.run(describe, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
