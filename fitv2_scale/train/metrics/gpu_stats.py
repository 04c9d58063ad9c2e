"""GPU statistics of all ranks: peak memory, and utilisation as NVML reports it. Nothing without CUDA."""

import logging
import math

import numpy as np
import torch

from fitv2_scale.parallel.world import World

_NODES_EVERY = 10  # reports: values of each node in all of them would be most of the journal

log = logging.getLogger(__name__)


class GpuStats:
    """Made by all ranks together. ``metrics`` takes the sum over the ranks of what ``local_values`` gives."""

    def __init__(self, world: World):
        self._world, self._on_cuda = world, world.device.type == "cuda"
        names = world.hosts if self._on_cuda else []
        self._node = [sorted(set(names), key=names.index).index(name) for name in names]
        self._reports = 0
        self._warned = False

    def local_values(self) -> np.ndarray:
        """float64 (2 * ranks,) of which this rank fills its own two: peak memory in GiB since the last call, and
        utilisation in percent, NaN if it cannot be read. Empty without CUDA."""
        if not self._on_cuda:
            return np.zeros(0)
        values, device = np.zeros((2, self._world.size)), self._world.device
        values[:, self._world.rank] = torch.cuda.max_memory_allocated(device) / 2**30, self._utilisation()
        torch.cuda.reset_peak_memory_stats(device)
        return values.flatten()

    def _utilisation(self) -> float:
        try:
            return float(torch.cuda.utilization(self._world.device))
        except Exception as error:  # no NVML, or one that refuses: no reason to end a run
            if not self._warned:
                log.warning(
                    "gpu_utilisation is left out, since that of rank %d cannot be read: %r", self._world.rank, error
                )
            self._warned = True
            return math.nan

    def metrics(self, summed: np.ndarray) -> dict[str, float]:
        if not self._on_cuda:
            return {}
        memory, busy = summed.reshape(2, -1)
        self._reports += 1
        return by_node(memory, busy, self._node if self._reports % _NODES_EVERY == 1 else [])


def by_node(memory: np.ndarray, busy: np.ndarray, node: list[int]) -> dict[str, float]:
    """The most memory and the mean utilisation of all ranks, and of each node if there are several.

    ``node`` is the number of each rank's node, or empty. {"gpu_memory_gib": 61.2, "gpu_utilisation": 97.0,
    "gpu_memory_gib/node0": 61.2, …}
    """
    parts = {"": slice(None)} | ({f"/node{n}": np.equal(node, n) for n in set(node)} if len(set(node)) > 1 else {})
    found = {f"gpu_memory_gib{name}": float(memory[part].max()) for name, part in parts.items()}
    found |= {f"gpu_utilisation{name}": float(busy[part].mean()) for name, part in parts.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}
