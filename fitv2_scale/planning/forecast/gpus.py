"""The GPUs that are known, by their data sheets: one table for the forecast, for MFU and for predictions of kernels."""

from dataclasses import dataclass

from data_sharding.errors import UserError


@dataclass(frozen=True)
class DataSheet:
    """Of the SXM board."""

    peak_tflops: float  # dense bf16
    memory_bytes: float
    nvlink: float  # bytes/s, in one direction


# By what is a part of the name that torch gives it.
GPUS = {
    "H200": DataSheet(989.0, 141e9, 450e9),
    "H100": DataSheet(989.0, 80e9, 450e9),
    "A100": DataSheet(312.0, 80e9, 300e9),
}
DEFAULT_GPU = "H200"  # that of the predictions in predicted.json


def data_sheet(gpu: str) -> DataSheet:
    """Raises UserError for one that is not in the table."""
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu} is not known: give {', '.join(GPUS)}")
    return GPUS[gpu]


def known_gpu(device: str) -> str | None:
    """Which one ``device`` is, by the name that torch gives it."""
    return next((gpu for gpu in GPUS if gpu in device), None)
