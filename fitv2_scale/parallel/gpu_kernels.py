"""Kernels that a config asks for and not every GPU has: ``layout.precision=fp8`` and ``layout.attention=flash4``."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
from torch.torch_version import TorchVersion

from data_sharding.errors import UserError
from fitv2_scale.config.layout import LayoutConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.deterministic import deterministic_kernels
from fitv2_scale.run.provenance import installed

_FLOAT8_TORCH = "2.13"  # the compiler of 2.11 cannot trace its products, and 2.12 has not been tried
_FLOAT8_FROM = (8, 9)  # compute capability: Ada; and all that are newer
_FLASH4_ON = (9, 10)  # major compute capability, by torch: Hopper, Blackwell
_FLASH4 = "flash-attn-4"


def require_kernels(layout: LayoutConfig, device: torch.device) -> None:
    """Returns if ``device`` can train with what ``layout`` asks for.

    Raises:
        UserError: it cannot, or the package that would let it is not installed; names all that is lacking.
    """
    _raise([*_float8_problems(layout, device), *_flash4_problems(layout, device)])


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("; ".join(problems))


def _flash4_problems(layout: LayoutConfig, device: torch.device) -> Iterator[str]:
    if layout.attention != "flash4":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in _FLASH4_ON:
        yield (
            f"layout.attention=flash4 needs a Hopper or Blackwell GPU, and this rank computes on {_named(device)}: set "
            "layout.attention=auto"
        )
    elif installed()[_FLASH4] is None:
        yield (
            f"layout.attention=flash4 needs the package {_FLASH4}: pip install {_FLASH4}, or set layout.attention=auto"
        )


def require_float8(layout: LayoutConfig, device: torch.device) -> None:
    """Raises UserError if ``layout`` asks for fp8 and ``device`` is a GPU that, or whose torch, is too old for it. The
    CPU has a plain form."""
    _raise(list(_float8_problems(layout, device)))


def require_float8_compiler(layout: LayoutConfig) -> None:
    """Raises UserError if ``layout`` asks for fp8 and this torch cannot compile it."""
    _raise(list(_compiler_problems(layout)))


def _float8_problems(layout: LayoutConfig, device: torch.device) -> Iterator[str]:
    if layout.precision != "fp8" or device.type != "cuda":
        return
    yield from _compiler_problems(layout)
    if torch.cuda.get_device_capability(device) < _FLOAT8_FROM:
        yield (
            f"layout.precision=fp8 needs a GPU of compute capability 8.9 or more, and this rank computes on "
            f"{_named(device)}: set layout.precision=bf16"
        )


def _compiler_problems(layout: LayoutConfig) -> Iterator[str]:
    if layout.precision == "fp8" and TorchVersion(torch.__version__) < _FLOAT8_TORCH:
        yield (
            f"layout.precision=fp8 needs torch {_FLOAT8_TORCH} or newer, not {torch.__version__}: install that, or set "
            "layout.precision=bf16"
        )


def kernel_notes(layout: LayoutConfig, device: torch.device) -> list[str]:
    """Sentences for the user of a rank on ``device``: what of ``layout`` has another form there."""
    if layout.kernels == "triton" and device.type != "cuda":
        return ["layout.kernels=triton: the CPU computes the same in plain torch, since Triton's kernels are for GPUs"]
    return []


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


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
