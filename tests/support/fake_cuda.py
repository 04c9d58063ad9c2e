"""A CUDA build of torch on a machine with NVIDIA GPUs, as far as one can ask it without computing there."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from fitv2_scale.parallel import device


class FakeCuda:
    """Like the real one it looks at CUDA_VISIBLE_DEVICES until it begins, and never again. ``driver``: whether torch
    can use it."""

    def __init__(self, gpus: int, driver: bool = True):
        self._gpus, self._driver = gpus, driver
        self.begun: int | None = None  # with how many GPUs

    def device_count(self) -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return self._gpus if visible is None else len([name for name in visible.split(",") if name])

    def is_available(self) -> bool:
        if self.begun is None:
            self.begun = self.device_count()
        return self._driver and self.begun > 0

    def init(self) -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
            "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
        )

    def install(self, folder: Path, setattr: Callable = setattr) -> "FakeCuda":
        """Puts it in torch's place; ``folder`` gets the driver's file. Returns itself."""
        for name in ("device_count", "is_available", "init"):
            setattr(torch.cuda, name, getattr(self, name))
        setattr(torch.version, "cuda", "13.0")
        file = folder / "version"
        file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n")
        setattr(device, "DRIVER_FILE", file)
        return self
