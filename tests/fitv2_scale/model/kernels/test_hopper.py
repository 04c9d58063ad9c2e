"""What Triton's compiler makes of the kernels for an H200: no register is spilled, at the widths of the models."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fitv2_scale.model.kernels import heads_and_swiglu_triton as heads_and_swiglu
from fitv2_scale.model.kernels import norm_and_gate_triton as norm_and_gate
from fitv2_scale.model.kernels.operators import CHUNK
from fitv2_scale.model.modulation import NORM_EPS

_REGISTERS, _THREADS = 65536, 2048  # of a multiprocessor
HIDDEN, HEAD_DIMS = (768, 1152, 2304), (64, 72, 96)  # B/2, XL/2, 3B/2


def compiled(kernel, dtypes: dict[str, str], constants: dict, folder: Path) -> tuple[int, int, int]:
    """Registers of a thread, and bytes of its stack and of its local memory."""
    options = {key: constants.pop(key) for key in ("num_warps",) if key in constants}
    divisible = {(place,): [["tt.divisibility", 16]] for place in range(len(dtypes))}  # as addresses and widths are
    source = ASTSource(kernel, dtypes | dict.fromkeys(constants, "constexpr"), constants, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    told = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", told)[1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack, local


def pointers(dtype: str, *names: str) -> dict[str, str]:
    return {name: f"*{dtype}" for name in names}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("norm,gate", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("channels", HIDDEN)
def test_norms_and_gates(tmp_path, channels, norm, gate, dtype):
    names = pointers(dtype, "grad", "grad_m", "x", "y", "scale", "gate") | {"cu_seqlens": "*i32"}
    names |= pointers(dtype, "grad_x", "grad_y") | {"sums": "*fp32"}
    names |= dict.fromkeys(("channels", "scale_row", "gate_row"), "i32")
    cut = norm_and_gate.blocks(channels)
    constants = {"NORM": norm, "GATE": gate, "CHUNK": CHUNK, "EPS": NORM_EPS, **cut}
    registers, stack, local = compiled(norm_and_gate.backward, names, constants, tmp_path)
    assert (stack, local) == (0, 0)
    threads = 32 * cut["num_warps"]
    assert threads * (_REGISTERS // (registers * threads)) >= _THREADS / 2  # that hide each other's waits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_heads(tmp_path, dim, norm, dtype):
    names = pointers(dtype, "grad_q", "grad_k", "grad_v", "qkv") | pointers("fp32", "cos", "sin")
    names |= pointers(dtype, "out") | {"sums": "*fp32", "tokens": "i32", "heads": "i32"}
    constants = {"DIM": dim, "NORM": norm, "CHUNK": CHUNK, "EPS": NORM_EPS, **heads_and_swiglu.blocks_of_head(dim)}
    registers, stack, local = compiled(heads_and_swiglu.heads, names, constants, tmp_path)
    assert (stack, local) == (0, 0) and registers <= 128


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_swiglu(tmp_path, dtype):
    names = pointers(dtype, "grad", "gate", "value", "out") | {"sums": "*fp32"}
    names |= dict.fromkeys(("tokens", "width", "gate_row", "value_row"), "i32")
    constants = {"CHUNK": CHUNK, **heads_and_swiglu.SWIGLU}
    registers, stack, local = compiled(heads_and_swiglu.swiglu, names, constants, tmp_path)
    assert (stack, local) == (0, 0) and registers <= 128
