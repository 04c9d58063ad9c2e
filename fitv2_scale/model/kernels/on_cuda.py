"""On CUDA the operators are kernels in Triton, imported when the first of them runs: CUDA builds of torch bring it."""

from importlib import import_module
from typing import Any

from fitv2_scale.model.kernels import operators

_MODULES = {
    "norm_and_gate_triton": ("gate_backward", "norm_backward", "join_backward"),
    "heads_and_swiglu_triton": ("swiglu_backward", "heads_backward"),
}


def register() -> None:
    for module, names in _MODULES.items():
        for name in names:
            getattr(operators, name).register_kernel("cuda")(_kernel(module, name))


def _kernel(module: str, name: str) -> Any:
    def run(*arguments: Any) -> Any:
        return getattr(import_module(f"fitv2_scale.model.kernels.{module}"), name)(*arguments)

    return run
