"""On CUDA the operators are kernels in Triton, imported when the first of them runs: CUDA builds of torch bring it."""

from importlib import import_module
from typing import Any

from fitv2_scale.model.kernels import operators

MODULES = {  # of each operator
    **dict.fromkeys(("gate_backward", "norm_backward", "join_backward"), "norm_and_gate_triton"),
    **dict.fromkeys(("swiglu_backward", "heads_backward"), "heads_and_swiglu_triton"),
}


def register() -> None:
    for name in MODULES:
        getattr(operators, name).register_kernel("cuda")(kernel(name))


def kernel(name: str) -> Any:
    """What an operator is in Triton."""

    def run(*arguments: Any) -> Any:
        return getattr(import_module(f"fitv2_scale.model.kernels.{MODULES[name]}"), name)(*arguments)

    return run
