"""Checks for `fitv2 doctor` whether this machine can compile what training compiles.

That is the network's blocks, by torch.compile: Triton (on CUDA) and Inductor (on a CPU) call a compiler and load its
output. DeepSpeed compiles operators of its own at their first use (FusedAdam, its CPU collectives), each for a minute
or more; the engine is set up so that it uses none.
"""

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from data_sharding.errors import UserError
from fitv2_scale.config.layout import LayoutConfig

_OFF = "or set layout.compile=false"
_SECONDS = 60
_TRIAL = "#include <Python.h>\nint trial(void) { return PY_MAJOR_VERSION; }\n"


def check_compiler(layout: LayoutConfig | None, on_cuda: bool) -> str:
    """Compiles and loads a trial library in torch.compile's cache, for a rank that computes ``on_cuda`` or on the CPU.
    Raises UserError with what is missing."""
    if not (layout.compiles(on_cuda) if layout else on_cuda):
        return "not needed: nothing is compiled"
    variable, known, suffix = ("CC", ("gcc", "clang"), "c") if on_cuda else ("CXX", ("g++", "clang++"), "cpp")
    compiler = os.environ.get(variable) or next(filter(shutil.which, known), None)
    if compiler is None:
        raise UserError(f"there is no {known[0]}, which torch.compile needs: install it, {_OFF}")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        raise UserError(f"Python.h is missing, which torch.compile needs: install python3-dev, {_OFF}")
    cache = _cache(on_cuda)
    filled = any(cache.rglob("*.so"))
    with tempfile.TemporaryDirectory(dir=cache, prefix="doctor-") as folder:
        source, made = Path(folder, f"trial.{suffix}"), Path(folder, "trial.so")
        source.write_text(_TRIAL)
        _compile([*compiler.split(), "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(made)])
        try:
            ctypes.CDLL(str(made))
        except OSError as error:
            raise UserError(
                f"libraries in {cache} cannot be loaded ({error}): set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to "
                "a folder whose files may be executed"
            ) from error
    return f"{compiler}, into {cache}, " + (
        "which has kernels" if filled else "still empty: the first steps will fill it"
    )


def check_deepspeed() -> str:
    """Imports DeepSpeed, which fails on some machines. Raises UserError if it is not installed."""
    from fitv2_scale.parallel import deepspeed_setup

    version = deepspeed_setup.deepspeed.__version__
    return f"{version}: AdamW is torch's, and no operator of DeepSpeed is compiled before step 1"


def _cache(on_cuda: bool) -> Path:
    """The folder of torch.compile's cache."""
    try:
        # Only here: importing it takes a second, and makes the folder.
        from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

        folder = Path(triton_cache_dir(torch.cuda.current_device()) if on_cuda else cache_dir())
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(
            f"torch.compile cannot write its cache ({error}): set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to a "
            "folder of this node"
        ) from error


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except OSError as error:
        raise UserError(f"the compiler {command[0]} cannot be started: {error.strerror}; {_OFF}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the compiler {command[0]} took more than {_SECONDS} s for a trial; {_OFF}") from error
    if done.returncode:
        first = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
        raise UserError(f"the compiler {command[0]} fails ({first}), which torch.compile needs: repair it, {_OFF}")
