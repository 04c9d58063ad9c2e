"""The GPUs that a step is predicted for: what Inductor asks of a device, and rates. Each rate, published or guessed,
names its source. Nothing here was measured by this project. What data sheets say is in ``planning/forecast/gpus.py``.
"""

from dataclasses import dataclass, field, replace

from data_sharding.errors import UserError
from fitv2_scale.planning.forecast.gpus import data_sheet

_GUESS = "a guess"


@dataclass(frozen=True)
class Rate:
    value: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """``properties`` are those of ``torch.cuda.get_device_properties``. Rates are in bytes/s, FLOP/s and seconds."""

    name: str
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    properties: dict[str, object] = field(repr=False)
    peak_flops: Rate
    product_flops: Rate  # that products reach whose tiles fill all processors
    float8_flops: Rate  # of products in fp8, likewise
    tile: tuple[int, int]  # of a product's result; a processor computes one at a time
    attention_forward_flops: Rate
    attention_backward_flops: Rate
    flash4: Rate  # times as many FLOP/s with FlashAttention 4
    elementwise_bytes: Rate
    copy_bytes: Rate
    kernel_seconds: Rate  # no kernel takes less
    launch_seconds: Rate  # of the host, for an operation that it starts
    block_seconds: Rate  # of the host, for FSDP's hooks around a block, in each direction

    def with_flash4(self) -> "Gpu":
        """With attention at the rates of FlashAttention 4."""
        forward, backward = (
            Rate(self.flash4.value * rate.value, f"{_GUESS}: {self.flash4.value:g} times that of FlashAttention 2")
            for rate in (self.attention_forward_flops, self.attention_backward_flops)
        )
        return replace(self, attention_forward_flops=forward, attention_backward_flops=backward)


GPUS = {
    "H200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        processors=132,
        properties={
            "name": "NVIDIA H200",
            "major": 9,
            "minor": 0,
            "total_memory": 150754820096,
            "multi_processor_count": 132,
            "max_threads_per_multi_processor": 2048,
            "max_threads_per_block": 1024,
            "regs_per_multiprocessor": 65536,
            "shared_memory_per_block": 49152,
            "shared_memory_per_block_optin": 232448,
            "shared_memory_per_multiprocessor": 233472,
            "L2_cache_size": 62914560,
            "warp_size": 32,
            "gcnArchName": "",
        },
        peak_flops=Rate(1e12 * data_sheet("H200").peak_tflops, "dense bf16, data sheet"),
        product_flops=Rate(748e12, f"{_GUESS}: large products at 788 TFLOP/s, times 0.95"),
        float8_flops=Rate(1496e12, f"{_GUESS}: as far below the data sheet's dense 1979 TFLOP/s as in bf16"),
        tile=(128, 256),
        attention_forward_flops=Rate(200e12, f"{_GUESS}: FlashAttention 2, images of 256 tokens"),
        attention_backward_flops=Rate(150e12, f"{_GUESS}: FlashAttention 2, images of 256 tokens"),
        flash4=Rate(2.0, f"{_GUESS}: by what is published for longer sequences"),
        elementwise_bytes=Rate(3.5e12, f"{_GUESS}: Triton kernels, of 4.8 TB/s by the data sheet"),
        copy_bytes=Rate(3.8e12, f"{_GUESS}: copies and the optimizer, of 4.8 TB/s by the data sheet"),
        kernel_seconds=Rate(3e-6, _GUESS),
        launch_seconds=Rate(5e-6, _GUESS),
        block_seconds=Rate(0.85e-3, "FSDP2 on a CPU, one rank, 24 blocks, on a busy machine"),
    ),
}


def gpu_named(name: str) -> Gpu:
    """Raises UserError for one that is not in the table."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: there are figures only for {', '.join(GPUS)}")
    return GPUS[name]
