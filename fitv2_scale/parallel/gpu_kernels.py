"""Kernels that a config asks for and not every GPU has: ``layout.precision=fp8`` and ``layout.attention=flash4``."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from data_sharding.errors import UserError
from fitv2_scale.config.layout import LayoutConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.deterministic import deterministic_kernels
from fitv2_scale.run.provenance import installed

_FLOAT8_FROM = (8, 9)  # compute capability: Ada; and all that are newer
_FLASH4_ON = (9, 10)  # major compute capability, by torch: Hopper, Blackwell
_FLASH4 = "flash-attn-4"


def require_kernels(layout: LayoutConfig, device: torch.device) -> None:
    """Returns if ``device`` has the kernels that ``layout`` asks for; the CPU computes fp8 in plain operators.

    Raises:
        UserError: it does not, or the package that brings them is not installed.
    """
    on_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_cuda else (0, 0)
    place = torch.cuda.get_device_name(device) if on_cuda else "this rank computes on the CPU"
    if layout.precision == "fp8" and on_cuda and capability < _FLOAT8_FROM:
        raise UserError(f"layout.precision=fp8 needs a GPU of compute capability 8.9 or more, not {place}: set bf16")
    if layout.attention != "flash4":
        return
    if capability[0] not in _FLASH4_ON:
        raise UserError(f"layout.attention=flash4 needs a Hopper or Blackwell GPU ({place}): set layout.attention=auto")
    if installed()[_FLASH4] is None:
        raise UserError(
            f"layout.attention=flash4 needs the package {_FLASH4}: pip install {_FLASH4}, or set layout.attention=auto"
        )


@contextmanager
def training_kernels(config: Config, device: torch.device) -> Generator[None]:
    """Inside, torch uses the kernels that ``config`` asks for in training. To be entered before the engine is built.

    Raises:
        UserError: there are none; as ``require_kernels`` and ``deterministic_kernels`` do.
    """
    require_kernels(config.layout, device)
    with deterministic_kernels(config.deterministic), _attention_kernels(config.layout):
        yield


@contextmanager
def _attention_kernels(layout: LayoutConfig) -> Generator[None]:
    if layout.attention == "auto":
        yield
        return
    try:
        activate_flash_attention_impl("FA4")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"layout.attention=flash4: torch {torch.__version__} cannot use the installed {_FLASH4} "
            f"{installed()[_FLASH4]}: {error}; set layout.attention=auto"
        ) from error
    try:
        yield
    finally:
        restore_flash_attention_impl()
