"""Pretends to torch that this process has a GPU, so that Inductor writes the code that it would write there.

Nothing can run on it: all tensors on it must be fake. torch remembers some of what it was told, so this belongs into a
process of its own. The CPU build of torch is enough, and Triton need not be installed: Inductor only needs it to
compile kernels, or if the model has Triton kernels of its own.
"""

import ctypes
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config
import torch._inductor.scheduler
import torch._subclasses.fake_tensor
import torch.utils._triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from data_sharding.errors import UserError
from fitv2_scale.bench.kernels.gpus import Gpu

_CUDA = 1  # of c10::DeviceType
# Places among the virtual functions of at::AcceleratorHooksInterface, behind its two destructors.
_IS_BUILT, _HAS_PRIMARY_CONTEXT = 2, 4
_FUNCTIONS = 64  # as many as are copied: more than these hooks have


@contextmanager
def fake_gpu(gpu: Gpu) -> Generator[None]:
    """Inside, this process has one ``gpu``. Raises UserError if it has a real one, or if this torch cannot pretend."""
    if torch.cuda.is_available():
        raise UserError("this process has a GPU: hide it with CUDA_VISIBLE_DEVICES=")
    with ExitStack() as stack:
        stack.enter_context(_in_cpp())
        # With Triton, Inductor would run products with and without padding, to see which is faster.
        stack.enter_context(torch._inductor.config.patch(shape_padding=False))
        for owner, name, value in _in_python(gpu):
            stack.enter_context(patch.object(owner, name, value, create=True))
        if not _works():
            raise _unable()
        yield


def _unable() -> UserError:
    return UserError(f"torch {torch.__version__} cannot compile for a GPU that is not there: use torch 2.13")


def _works() -> bool:
    try:
        return _gradient_on_gpu().device.type == "cuda"
    except RuntimeError:  # this torch asked the driver itself
        return False


def _gradient_on_gpu() -> torch.Tensor:
    with FakeTensorMode():
        x = torch.empty(2, device="cuda", requires_grad=True)
        return torch.autograd.grad((x * x).sum(), x)[0]


@contextmanager
def _in_cpp() -> Generator[None]:
    """Gives autograd, which is C++, a device guard that does nothing, and hooks that say that CUDA is built in.

    torch has such a guard, but installs it only in place of one that counts no devices. So it is first given an object
    all of whose functions return 0.
    """
    folder = Path(torch.__file__).parent / "lib"
    try:
        cpp, cpu = (ctypes.CDLL(str(folder / name)) for name in ("libc10.so", "libtorch_cpu.so"))
        guards = (ctypes.c_void_p * (_CUDA + 1)).in_dll(cpp, "_ZN3c104impl26device_guard_impl_registryE")
        get_hooks = cpu["_ZN2at6detail12getCUDAHooksEv"]
    except (OSError, ValueError, AttributeError) as error:
        raise _unable() from error
    zero = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: 0)
    one = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: 1)
    guard_before, functions = guards[_CUDA], (ctypes.c_void_p * _FUNCTIONS)(*[_address(zero)] * _FUNCTIONS)
    counts_nothing = ctypes.c_void_p(ctypes.addressof(functions))
    guards[_CUDA] = ctypes.addressof(counts_nothing)
    torch._C._ensureCUDADeviceGuardSet()

    get_hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get_hooks())  # the hooks' pointer to their virtual functions
    table_before = table.value
    hooks = (ctypes.c_void_p * _FUNCTIONS)(*(ctypes.c_void_p * _FUNCTIONS).from_address(table_before or 0))
    hooks[_IS_BUILT], hooks[_HAS_PRIMARY_CONTEXT] = _address(one), _address(zero)
    table.value = ctypes.addressof(hooks)
    try:
        yield
    finally:
        table.value, guards[_CUDA] = table_before, guard_before


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _in_python(gpu: Gpu) -> list[tuple[Any, str, Any]]:
    """(object, attribute, value): what torch's Python asks of CUDA before and while it compiles."""
    properties = SimpleNamespace(**gpu.properties)
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=_CUDA)
    here = {"is_available": True, "device_count": 1, "get_device_properties": properties, "is_bf16_supported": True}
    device = {"current_device": 0, "set_device": None, "synchronize": None, "current_stream": stream}
    of_cuda = {
        "get_device_capability": gpu.capability,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "is_current_stream_capturing": False,
        **dict.fromkeys(("set_rng_state", "_lazy_init")),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
    }
    of_interface = {
        "get_compute_capability": 10 * gpu.capability[0] + gpu.capability[1],
        "is_triton_capable": True,
        **dict.fromkeys(("exchange_device", "maybe_exchange_device", "get_raw_stream"), 0),
    }
    worker = CudaInterface.Worker
    return [
        *((torch.cuda, name, _answering(value)) for name, value in (here | device | of_cuda).items()),
        *((CudaInterface, name, _answering(value)) for name, value in (here | device | of_interface).items()),
        *((worker, name, _answering(value)) for name, value in (here | device).items() if hasattr(worker, name)),
        (torch._inductor.scheduler, "has_triton", _answering(True)),
        (torch.utils._triton, "triton_hash_with_backend", _answering("")),
        (FakeTensorMode, "avoid_device_init", True),
        (torch._subclasses.fake_tensor, "init_gpu_context", _answering(None)),
        (UniformValueConstantFolder, "_deduce_value", _on_cpu(UniformValueConstantFolder._deduce_value)),
    ]


def _answering(value: Any) -> Any:
    return staticmethod(lambda *_, **__: value)


def _on_cpu(method: Any) -> Any:
    """``method``, of which real tensors are made on the CPU instead: Inductor computes constants."""

    def run(*args: Any) -> Any:
        with _ConstructorsOnCpu():
            return method(*args)

    return run


class _ConstructorsOnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"device": torch.device("cpu")} if "device" in kwargs else kwargs))
