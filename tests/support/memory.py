"""What memory holds: a process by the system's count, a rank's state, and what is left of a forward pass."""

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.world import join
from tests.support.layout_grid import CLASSES
from tests.support.tiny_networks import pack

_COUNTED = (torch.float32, torch.bfloat16)  # of state; DeepSpeed keeps the last norm, a float64
_PACKING = pack([(3, 4), (4, 4)], 32, 3, 16)


def peak_growth(act: Callable[[], object]) -> int:
    """Bytes by which this process grows at most in ``act``."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is now
    before = status("VmRSS")
    act()
    return status("VmHWM") - before


def _live() -> dict[StorageWeakRef, int]:
    """Memory of all tensors of the process that may be state; gradients may have no Python object of their own."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = [getattr(t, "_local_tensor", t).untyped_storage() for t in tensors if t.dtype in _COUNTED]
    return {StorageWeakRef(s): s.nbytes() for s in storages if s.nbytes()}


def engine_bytes(config: Config, expected: list[tuple]) -> tuple[int, int, int, int]:
    """Bytes that a rank's engine adds: when it is made, between two packs of a step, before the update, after it.

    ``expected`` has what is expected of each rank, None where nothing is: memory is given back a moment late.
    """
    with join() as world:
        _ = _PACKING.padded
        before, found = set(_live()), []
        gc.freeze()  # the objects that are there need not be looked at again

        def held() -> int:
            return sum(size for storage, size in _live().items() if storage not in before)

        def note() -> None:  # gloo's threads let go of the tensors of a collective some time after it
            wanted, until = expected[world.rank][len(found)], time.monotonic() + 30
            while wanted not in (size := held(), None) and time.monotonic() < until:
                time.sleep(0.05)
            found.append(size)

        layout = Layout.of(world.size, config.layout.replicate, config.layout.tensor)
        engine = make_engine(config, layout, world)
        note()
        for last in (False, True):
            torch.manual_seed(0)
            out = engine.network(torch.randn(32, 16), torch.rand(3), torch.tensor([1, CLASSES, 0]), _PACKING)
            engine.backward(out.square().sum(), last)
            del out
            note()
        result = engine.step(1e-3, 1.0)
        assert not result.skipped
        del result
        note()
        return tuple(found)


class HeldResults(TorchDispatchMode):
    """Knows the memory of every operator's results, views of ``weights`` left out, and how much of it is still held."""

    def __init__(self, weights: list[torch.Tensor]):
        super().__init__()
        self._bytes, self._weights = {}, {StorageWeakRef(w.untyped_storage()) for w in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._bytes[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        return out

    def held(self) -> int:
        live = (s for s in self._bytes if not s.expired() and s not in self._weights)
        return sum(self._bytes[storage] for storage in live)
