"""Which machine this is: prints JSON."""

import json
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch


def describe() -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
        with suppress(OSError):
            found["GPU"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found | {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}


if __name__ == "__main__":
    print(json.dumps(describe()))
