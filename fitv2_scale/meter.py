"""What a run reports about itself: numbers over a window of steps, for the journal and the progress bar."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from data_sharding.batch import StepBatch
from fitv2_scale.model.config import ModelConfig
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.parallel.world import World
from fitv2_scale.spikes import SpikeDetector

_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16, of the SXM boards; from the data sheets


@dataclass(frozen=True)
class StepNumbers:
    """What came out of a step, on the host."""

    loss: float  # this rank's share: the data-parallel ranks' shares add up to the step's
    norm: float  # of the gradient, the same on all ranks
    skipped: bool  # the same on all ranks


@dataclass(frozen=True)
class Spike:
    step: int
    loss: float
    sigmas: float  # above the running mean

    def __str__(self) -> str:
        return f"loss spike: {self.loss:.4f} at step {self.step}, {self.sigmas:.1f} sigma above the running mean"


@dataclass
class _Window:
    """Sums over the steps since the last report."""

    began: float
    steps: list[int] = field(default_factory=list)
    numbers: list[StepNumbers] = field(default_factory=list)
    images: int = 0
    substituted: int = 0
    tokens: int = 0
    room: int = 0  # tokens that the packs had room for, on all ranks
    flops: int = 0
    imbalance: float = 0.0
    data_wait: float = 0.0


class Meter:
    """Fed by every rank with each step; ``report`` is a collective.

    ``loss_counts`` is false on ranks that repeat another's share of the loss. ``spike_sigma`` 0 looks for no spikes.
    """

    def __init__(
        self,
        world: World,
        model: ModelConfig,
        max_seqlen: int,
        *,
        peak_tflops: float | None,
        loss_counts: bool,
        spike_sigma: float,
    ):
        self._world, self._loss_counts = world, loss_counts
        self._flops = [0] + [3 * forward_flops(model, n) for n in range(1, max_seqlen + 1)]
        self._peak = peak_tflops or known_peak(world.device)
        self._spikes = SpikeDetector(spike_sigma) if spike_sigma else None
        self._window = _Window(time.perf_counter())

    @property
    def steps(self) -> int:
        """Since the last report."""
        return len(self._window.steps)

    def update(self, batch: StepBatch, numbers: StepNumbers, data_wait: float) -> None:
        w = self._window
        w.steps.append(batch.step + 1)
        w.numbers.append(numbers)
        w.images += batch.step_images
        w.substituted += batch.step_substituted
        w.tokens += batch.step_tokens
        w.room += batch.step_room
        w.flops += sum(self._flops[n] for n in batch.step_lengths.tolist())
        w.imbalance += batch.step_cost_max / batch.step_cost_mean
        w.data_wait += data_wait

    def report(self) -> tuple[dict[str, float], list[Spike]]:
        """The window's metrics and spikes, the same on all ranks; begins a new window.

        Loss and norm are over the steps that were not skipped, NaN if there is none.
        """
        w, steps = self._window, len(self._window.steps)
        shares = [n.loss if self._loss_counts else 0.0 for n in w.numbers]
        summed = self._world.sum(torch.tensor(shares, dtype=torch.float64)).tolist()
        losses = {s: x for s, x, n in zip(w.steps, summed, w.numbers, strict=True) if not n.skipped}
        counted = list(losses.values()) or [math.nan]
        norms = [n.norm for n in w.numbers if not n.skipped] or [math.nan]
        seconds = time.perf_counter() - w.began
        metrics = {
            "loss": sum(counted) / len(counted),
            "loss_min": min(counted),
            "loss_max": max(counted),
            "grad_norm": sum(norms) / len(norms),
            "images_per_second": w.images / seconds,
            "tokens_per_second": w.tokens / seconds,
            "packing_fill": w.tokens / w.room,
            "rank_imbalance": w.imbalance / steps,
            "data_wait_share": w.data_wait / seconds,
            "skipped_steps": float(steps - len(losses)),
            "substituted_images": float(w.substituted),
        }
        if self._peak:
            metrics["mfu"] = w.flops / seconds / (self._peak * 1e12 * self._world.size)
        spikes = self._find_spikes(losses)
        if self._spikes:
            metrics["loss_spikes"] = float(len(spikes))
        self._window = _Window(time.perf_counter())
        return metrics, spikes

    def _find_spikes(self, losses: dict[int, float]) -> list[Spike]:
        if self._spikes is None:
            return []
        distances = {step: self._spikes.distance(loss) for step, loss in losses.items()}
        return [Spike(step, losses[step], sigmas) for step, sigmas in distances.items() if sigmas is not None]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (saving, sampling) does not count as the window's time."""
        began = time.perf_counter()
        yield
        self._window.began += time.perf_counter() - began


def known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_TFLOPS.items() if known in name), None)
