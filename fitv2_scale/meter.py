"""What a run reports about itself: numbers over a window of steps, for the journal and the progress bar."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_sharding.stream import StepBatch
from fitv2_scale.model.config import ModelConfig
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.parallel.engine import StepResult
from fitv2_scale.parallel.world import World

_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16, of the SXM boards; from the data sheets


@dataclass
class _Window:
    """Sums over the steps since the last report."""

    began: float
    losses: list[Tensor] = field(default_factory=list)  # on the device: read once a window, not once a step
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    images: int = 0
    substituted: int = 0
    tokens: int = 0
    room: int = 0  # tokens that the packs had room for, on all ranks
    flops: int = 0
    imbalance: float = 0.0
    data_wait: float = 0.0


class Meter:
    """Fed by every rank each step; ``report`` is a collective."""

    def __init__(self, world: World, model: ModelConfig, max_seqlen: int, peak_tflops: float | None):
        self._world = world
        self._flops = [0] + [3 * forward_flops(model, n) for n in range(1, max_seqlen + 1)]
        self._peak = peak_tflops or _known_peak(world.device)
        self._window = _Window(time.perf_counter())

    @property
    def steps(self) -> int:
        """Since the last report."""
        return len(self._window.losses)

    def update(self, batch: StepBatch, loss: Tensor, result: StepResult, data_wait: float) -> None:
        w = self._window
        w.losses.append(loss)
        w.norms.append(result.norm)
        w.skipped += result.skipped
        w.images += batch.step_images
        w.substituted += batch.step_substituted
        w.tokens += batch.step_tokens
        w.room += batch.step_room
        w.flops += sum(self._flops[n] for n in batch.step_lengths.tolist())
        w.imbalance += batch.step_cost_max / batch.step_cost_mean
        w.data_wait += data_wait

    def report(self) -> dict[str, float]:
        """The window's metrics, the same on all ranks; begins a new window."""
        w, steps = self._window, len(self._window.losses)
        losses = self._world.sum(torch.stack(w.losses).double().cpu())
        seconds = time.perf_counter() - w.began
        metrics = {
            "loss": losses.mean().item(),
            "loss_min": losses.min().item(),
            "loss_max": losses.max().item(),
            "grad_norm": sum(w.norms) / steps,
            "images_per_second": w.images / seconds,
            "tokens_per_second": w.tokens / seconds,
            "packing_fill": w.tokens / w.room,
            "rank_imbalance": w.imbalance / steps,
            "data_wait_share": w.data_wait / seconds,
            "skipped_steps": float(w.skipped),
            "substituted_images": float(w.substituted),
        }
        if self._peak:
            metrics["mfu"] = w.flops / seconds / (self._peak * 1e12 * self._world.size)
        self._window = _Window(time.perf_counter())
        return metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (saving, sampling) does not count as the window's time."""
        began = time.perf_counter()
        yield
        self._window.began += time.perf_counter() - began


def _known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_TFLOPS.items() if known in name), None)
