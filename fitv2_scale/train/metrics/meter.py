"""The metrics of a run by name: numbers over a window of steps, for the journal and the progress bar."""

import logging
import math
import time
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np
import torch

from data_sharding.stream.batch import StepBatch
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.model.loss_groups import GROUPS, loss_by_group
from fitv2_scale.parallel.world import World
from fitv2_scale.planning.forecast.gpus import GPUS, known_gpu
from fitv2_scale.train.metrics.accounting import Accounting, AttemptClock, Elapsed
from fitv2_scale.train.metrics.gpu_stats import GpuStats
from fitv2_scale.train.metrics.loss_spikes import SpikeDetector

_NOTICEABLE = 1e-3  # seconds in a window; a shorter stall is not reported

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepNumbers:
    """The results of a step, on the host, and when it ended."""

    sums: np.ndarray  # this rank's part of the loss by group (see ``loss_groups.group_sums``); adds up over the ranks
    norm: float  # of the gradient, the same on all ranks
    skipped: bool  # the same on all ranks
    ended: Elapsed


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

    began: Elapsed
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
    """Every rank updates it with each step. All ranks make it together, and ``report`` is a collective.

    ``before`` is what the run had taken before this attempt, ``created`` when the run was made, in ISO 8601.
    ``loss_counts`` is false on ranks whose part of the loss repeats that of another rank of their tensor group.
    ``spike_sigma`` 0: spikes are not looked for.
    """

    def __init__(
        self,
        world: World,
        model: ModelConfig,
        max_seqlen: int,
        before: Accounting,
        clock: AttemptClock,
        *,
        created: str,
        peak_tflops: float | None,
        loss_counts: bool,
        spike_sigma: float,
    ):
        self._world, self._loss_counts = world, loss_counts
        self._flops = np.array([0] + [3 * forward_flops(model, n) for n in range(1, max_seqlen + 1)])
        self._before, self._accounting, self._clock = before, before, clock
        self._created = datetime.fromisoformat(created).timestamp()
        self._gpus = GpuStats(world)
        self._peak = peak_tflops or known_peak(world.device)
        self._spikes = SpikeDetector(spike_sigma) if spike_sigma else None
        self._window = _Window(clock.now())
        self._clock_is_wrong = False

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
        w.room += batch.step_capacity
        w.flops += int(self._flops[batch.step_lengths].sum())
        w.imbalance += batch.step_cost_max / batch.step_cost_mean
        w.data_wait += data_wait

    def report(self) -> tuple[dict[str, float], list[Spike]]:
        """The window's metrics and spikes, the same on all ranks except for times; starts a new window.

        Loss and norm are averages over the steps that were not skipped, NaN if there is none.
        """
        w, steps = self._window, len(self._window.steps)
        losses, sums, gpus = self._summed(w)
        counted = list(losses.values()) or [math.nan]
        norms = [n.norm for n in w.numbers if not n.skipped] or [math.nan]
        took = w.numbers[-1].ended.since(w.began)
        seconds = took.training
        metrics = {
            "loss": sum(counted) / len(counted),
            "loss_min": min(counted),
            "loss_max": max(counted),
            **loss_by_group(sums),
            "grad_norm": sum(norms) / len(norms),
            "images_per_second": w.images / seconds,
            "tokens_per_second": w.tokens / seconds,
            "packing_fill": w.tokens / w.room,
            "rank_imbalance": w.imbalance / steps,
            "data_wait_share": w.data_wait / seconds,
            "skipped_steps": float(steps - len(losses)),
            "substituted_images": float(w.substituted),
            **self._gpus.metrics(gpus),
        }
        if self._peak:
            metrics["mfu"] = w.flops / seconds / (self._peak * 1e12 * self._world.size)
        spikes = self._find_spikes(losses)
        if self._spikes:
            metrics["loss_spikes"] = float(len(spikes))
        self._accounting = replace(
            self._accounting,
            tokens=self._accounting.tokens + w.tokens,
            flops=self._accounting.flops + w.flops,
            step_seconds=self._accounting.step_seconds + seconds - took.compile - w.data_wait,
        )
        metrics |= self._run_metrics(took)
        self._window = _Window(w.numbers[-1].ended)
        return metrics, spikes

    def accounting(self) -> Accounting:
        """Of the run: steps up to the last report, time up to now."""
        now = self._clock.now()
        return replace(
            self._accounting,
            device_seconds=self._before.device_seconds + now.total * self._world.size,
            evaluation_seconds=self._before.evaluation_seconds + now.evaluation,
            compile_seconds=self._before.compile_seconds + now.compile,
        )

    def _summed(self, w: _Window) -> tuple[dict[int, float], np.ndarray, np.ndarray]:
        """Over the ranks: the loss of each step that was not skipped, by step; the sums by group; GPU statistics."""
        sums = np.stack([n.sums for n in w.numbers])  # (steps, 2, groups)
        kept = np.array([not n.skipped for n in w.numbers])
        mine = np.concatenate((sums[:, 0, 0], sums[kept].sum(0).flatten()))
        if not self._loss_counts:
            mine = np.zeros_like(mine)  # and not NaN, whatever this rank has seen
        parts = [len(sums), len(sums) + 2 * len(GROUPS)]
        summed = self._world.all_reduce_sum(torch.from_numpy(np.concatenate((mine, self._gpus.local_values())))).numpy()
        by_step, groups, gpus = np.split(summed, parts)
        losses = {step: x for step, x, counts in zip(w.steps, by_step.tolist(), kept.tolist(), strict=True) if counts}
        return losses, groups.reshape(2, -1), gpus

    def _run_metrics(self, window: Elapsed) -> dict[str, float]:
        """Sums over the run; and the seconds of the window that went to something other than steps, if any did."""
        run = self.accounting()
        found = {"tokens": float(run.tokens), "flops": float(run.flops), "gpu_hours": run.device_seconds / 3600}
        if window.checkpoint > _NOTICEABLE:
            found["checkpoint_stall_seconds"] = window.checkpoint
        if window.evaluation:
            found["evaluation_seconds"] = window.evaluation
        if window.compile:
            found["compile_seconds"] = window.compile
        return found | self._shares(run, window)

    def _shares(self, run: Accounting, window: Elapsed) -> dict[str, float]:
        """Shares of the time since the run was made; none if a clock is wrong, which would give absurd ones."""
        age = time.time() - self._created
        if age < run.step_seconds + run.evaluation_seconds + run.compile_seconds:
            if not self._clock_is_wrong:
                log.warning("the run is %.0f s old by this node's clock, less than it trained: no goodput", age)
            self._clock_is_wrong = True
            return {}
        found = {"goodput": run.step_seconds / age}
        if window.evaluation:
            found["goodput_evaluation"] = run.evaluation_seconds / age
        if window.compile:
            found["goodput_compile"] = run.compile_seconds / age
        return found

    def _find_spikes(self, losses: dict[int, float]) -> list[Spike]:
        if self._spikes is None:
            return []
        distances = {step: self._spikes.distance(loss) for step, loss in losses.items()}
        return [Spike(step, losses[step], sigmas) for step, sigmas in distances.items() if sigmas is not None]


def known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    gpu = known_gpu(torch.cuda.get_device_name(device))
    return GPUS[gpu].peak_tflops if gpu else None
