"""How long a training step takes on other nodes than those it was measured on: arithmetic, then the network.

A pack's forward pass takes a third of its time, its backward pass the rest. FSDP2 gathers the weights once for each of
them, which hides behind that pass as far as it is long enough; gradients are reduced once a step, behind the backward
pass of the last pack. What does not hide is ``exposed``. Links inside of a node and between nodes work side by side. A
group of ranks that reaches beyond a node runs at the speed of the network.

Left out: latency, the traffic of tensor parallelism, what overlapping takes from the compute, and matrix products that
become less efficient on short packs. So a measured step is longer than this on many nodes.
"""

import math
from dataclasses import dataclass

from data_sharding.errors import UserError
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.planning.forecast.assumptions import Assumed, Figure

_FLOAT32 = 4
_BYTES = {"fp32": 4, "bf16": 2}
_SAME = 0.05  # FLOPs of an image that differ by more belong to another network


@dataclass(frozen=True)
class Pace:
    """Seconds of one step. ``compute`` is arithmetic and padding, ``exposed`` the transfers that do not hide behind
    it, ``fixed`` the optimizer where it was measured apart."""

    compute: float
    exposed: float
    fixed: float
    source: str

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.fixed


def step_pace(
    config: Config, layout: Layout, gpus_per_node: int, flops: float, packing: dict[str, float], assumed: Assumed
) -> Pace:
    """A step of ``flops``, whose ``packing`` has fill and packs_per_rank. Raises UserError if the bench file was made
    with another network."""
    rate, fixed = _rate(config, flops, assumed)
    ranks = layout.data_parallel * layout.tensor
    bench = assumed.step_bench
    if bench and bench.ranks == ranks and math.isclose(bench.flops, flops, rel_tol=_SAME):
        return Pace(bench.seconds - fixed, 0.0, fixed, f"measured on {ranks} x {bench.machine} ({bench.file})")
    compute = flops / packing["fill"] / ranks / rate.value
    exposed = exposed_seconds(config, layout, gpus_per_node, compute, packing["packs_per_rank"], assumed)
    return Pace(compute, exposed, fixed, rate.source)


def _rate(config: Config, flops: float, assumed: Assumed) -> tuple[Figure, float]:
    """FLOP/s of one rank on full packs, and the fixed part of a step."""
    if bench := assumed.step_bench:
        an_image = flops / config.batch.images
        if not math.isclose(bench.flops / bench.images, an_image, rel_tol=_SAME):
            raise UserError(
                f"{bench.file} was measured at {bench.flops / bench.images:.3g} FLOP an image, this run takes "
                f"{an_image:.3g}: measure with the same model and data"
            )
        rate = bench.flops_per_second()
        return Figure(rate, f"{rate / 1e12:.4g} TFLOP/s, from {bench.ranks} x {bench.machine} ({bench.file})"), (
            bench.fixed_seconds
        )
    peak = config.tracking.peak_tflops or assumed.peak_tflops.value
    source = f"MFU {assumed.mfu.value:g} of {peak:g} TFLOP/s; {assumed.mfu.source}"
    return Figure(assumed.mfu.value * peak * 1e12, source), 0.0


def exposed_seconds(
    config: Config, layout: Layout, gpus_per_node: int, compute: float, packs: float, assumed: Assumed
) -> float:
    """Of a step's transfers, those that its ``compute`` seconds do not hide."""
    within, between = traffic_seconds(config, layout, gpus_per_node, assumed)
    pack = compute / packs
    gather, reduce = (max(a, b) for a, b in zip(within, between, strict=True))
    if config.layout.engine == "zero3":  # reduces in each pack
        return packs * (max(0.0, gather - pack / 3) + max(0.0, gather + reduce - 2 * pack / 3))
    forward, backward = max(0.0, gather - pack / 3), max(0.0, gather - 2 * pack / 3)
    last = max(0.0, *(w[0] + w[1] - 2 * pack / 3 for w in (within, between)))
    return packs * forward + (packs - 1) * backward + last


def traffic_seconds(
    config: Config, layout: Layout, gpus_per_node: int, assumed: Assumed
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds to gather the weights once and to reduce the gradients, on the links within a node and between nodes."""
    numbers = parameter_count(config.model) / layout.tensor
    shard, replicate = layout.shard, layout.replicate
    gather = _BYTES[config.layout.precision] * numbers * (shard - 1) / shard
    scatter = _FLOAT32 * numbers * (shard - 1) / shard
    exchange = 2 * _FLOAT32 * numbers / shard * (replicate - 1) / replicate
    link, network = assumed.nvlink.value, assumed.network.value
    if shard * layout.tensor > gpus_per_node:
        return (0.0, 0.0), (gather / network, (scatter + exchange) / network)
    if shard * layout.tensor * replicate <= gpus_per_node:
        return (gather / link, (scatter + exchange) / link), (0.0, 0.0)
    return (gather / link, scatter / link), (0.0, exchange / network)
