"""How long a training step takes on other nodes than those it was measured on: arithmetic, then the network.

The forward pass of a pack takes a third of its time, the backward pass the rest. FSDP2 gathers the weights once for
each pass and overlaps this with the computation; gradients are reduced once per step, overlapped with the backward pass
of the last pack. Transfers that the computation does not hide are ``exposed``. Links within a node and between nodes
work in parallel. A group of ranks that spans several nodes runs at the speed of the network.

Left out: latency, the traffic of tensor parallelism, the compute that overlapping takes, and the lower efficiency of
matrix products on short packs. So on many nodes a measured step is longer than this.
"""

import math
from dataclasses import dataclass

from data_sharding.errors import UserError
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.planning.forecast.assumptions import Assumptions, Figure

_FLOAT32 = 4
_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}  # of a weight that is gathered
_SAME = 0.05  # if the FLOPs of an image differ by more, the network is another one


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. ``compute`` is arithmetic, padding included; ``exposed`` the transfers that it does not
    hide; ``fixed`` the optimizer and EMA, where they were measured separately."""

    compute: float
    exposed: float
    fixed: float
    source: str

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.fixed


def estimate_step_time(
    config: Config,
    layout: Layout,
    gpus_per_node: int,
    flops: float,
    packing: dict[str, float],
    assumptions: Assumptions,
) -> StepTime:
    """The time of a step of ``flops`` FLOPs, whose ``packing`` has fill and packs_per_rank. Raises UserError if the
    bench file was made with another network."""
    rate, fixed = _rate(config, flops, assumptions)
    ranks = layout.data_parallel * layout.tensor
    bench = assumptions.step_bench
    if bench and bench.ranks == ranks and math.isclose(bench.flops, flops, rel_tol=_SAME):
        return StepTime(bench.seconds - fixed, 0.0, fixed, f"measured on {ranks} x {bench.machine} ({bench.file})")
    compute = flops / packing["fill"] / ranks / rate.value
    exposed = exposed_seconds(config, layout, gpus_per_node, compute, packing["packs_per_rank"], assumptions)
    return StepTime(compute, exposed, fixed, rate.source)


def _rate(config: Config, flops: float, assumptions: Assumptions) -> tuple[Figure, float]:
    """FLOP/s of one rank on full packs, and the fixed part of a step."""
    if bench := assumptions.step_bench:
        an_image = flops / config.batch.images
        if not math.isclose(bench.flops / bench.images, an_image, rel_tol=_SAME):
            raise UserError(
                f"{bench.file} was measured at {bench.flops / bench.images:.3g} FLOP per image, but this run takes "
                f"{an_image:.3g}: measure with the same model and data"
            )
        rate = bench.flops_per_second()
        return Figure(rate, f"{rate / 1e12:.4g} TFLOP/s, from {bench.ranks} x {bench.machine} ({bench.file})"), (
            bench.fixed_seconds
        )
    peak = config.tracking.peak_tflops or assumptions.peak_tflops.value
    source = f"MFU {assumptions.mfu.value:g} of {peak:g} TFLOP/s; {assumptions.mfu.source}"
    return Figure(assumptions.mfu.value * peak * 1e12, source), 0.0


def exposed_seconds(
    config: Config, layout: Layout, gpus_per_node: int, compute: float, packs: float, assumptions: Assumptions
) -> float:
    """The seconds of a step's transfers that its ``compute`` seconds do not hide."""
    within, between = traffic_seconds(config, layout, gpus_per_node, assumptions)
    pack = compute / packs
    gather, reduce = (max(a, b) for a, b in zip(within, between, strict=True))
    if config.layout.engine == "zero3":  # reduces in each pack
        return packs * (max(0.0, gather - pack / 3) + max(0.0, gather + reduce - 2 * pack / 3))
    forward, backward = max(0.0, gather - pack / 3), max(0.0, gather - 2 * pack / 3)
    last = max(0.0, *(w[0] + w[1] - 2 * pack / 3 for w in (within, between)))
    return packs * forward + (packs - 1) * backward + last


def traffic_seconds(
    config: Config, layout: Layout, gpus_per_node: int, assumptions: Assumptions
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds to gather the weights once and to reduce the gradients, on the links within a node and between nodes."""
    numbers = parameter_count(config.model) / layout.tensor
    shard, replicate = layout.shard, layout.replicate
    gather = _BYTES[config.layout.precision] * numbers * (shard - 1) / shard
    scatter = _FLOAT32 * numbers * (shard - 1) / shard
    exchange = 2 * _FLOAT32 * numbers / shard * (replicate - 1) / replicate
    link, network = assumptions.nvlink.value, assumptions.network.value
    if shard * layout.tensor > gpus_per_node:
        return (0.0, 0.0), (gather / network, (scatter + exchange) / network)
    if shard * layout.tensor * replicate <= gpus_per_node:
        return (gather / link, (scatter + exchange) / link), (0.0, 0.0)
    return (gather / link, scatter / link), (0.0, exchange / network)
