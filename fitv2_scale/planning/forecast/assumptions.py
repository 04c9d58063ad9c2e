"""The figures of a forecast that cannot be computed: measured by `fitv2 bench`, given by the user, or published. Each
has a source, which the report names."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_sharding.errors import UserError
from data_sharding.storage.json_bytes import parse_json
from data_sharding.storage.records import Seconds, Shape
from fitv2_scale.config.layout import LayoutConfig
from fitv2_scale.planning.forecast.gpus import DEFAULT_GPU, data_sheet, known_gpu


@dataclass(frozen=True)
class Figure:
    value: float
    source: str


def _of_gpu(gpu: str) -> dict[str, Figure]:
    sheet = data_sheet(gpu)
    return {
        "peak_tflops": Figure(sheet.peak_tflops, f"dense bf16 of an {gpu} SXM, data sheet"),
        "gpu_bytes": Figure(sheet.memory_bytes, f"{gpu} SXM, data sheet"),
        "nvlink": Figure(sheet.nvlink, f"NVLink of an {gpu} SXM, one direction, data sheet"),
    }


_DEFAULT = _of_gpu(DEFAULT_GPU)
PUBLISHED_MFU = Figure(0.463, "MPT-3B on 8 H100, FSDP, bf16 (llm-foundry's benchmark table); not measured here")


@dataclass(frozen=True)
class StepBench:
    """The figures that a plan takes from `fitv2 bench step --json`."""

    file: str
    machine: str
    ranks: int
    images: float  # per step
    seconds: float  # per step
    fixed_seconds: float  # of these, the part that more data-parallel ranks do not shorten: optimizer and EMA
    flops: float  # per step
    fill: float
    peak_tflops: float | None
    layout: LayoutConfig | None = None  # None: a report of before, which does not say
    deterministic: bool = False

    def flops_per_second(self) -> float:
        """The rate of one rank on packs without padding."""
        return self.flops / self.fill / self.ranks / (self.seconds - self.fixed_seconds)


@dataclass(frozen=True)
class Assumptions:
    """Rates in bytes/s per GPU; times in seconds.

    ``durable_seconds`` is the time from the start of a save until it is durable, ``stall_seconds`` the part of it for
    which training waits. ``gpu`` is what peak, memory and NVLink are of. ``not_in_time`` names the config's keys, as
    key=value, that make a step faster or slower and that the MFU, or the measured step, does not contain.
    """

    gpu: str = DEFAULT_GPU
    mfu: Figure = PUBLISHED_MFU
    peak_tflops: Figure = _DEFAULT["peak_tflops"]
    gpu_bytes: Figure = _DEFAULT["gpu_bytes"]
    network: Figure = Figure(50e9, "one port of 400 Gb/s per GPU")
    nvlink: Figure = _DEFAULT["nvlink"]
    failures_per_node_day: Figure = Figure(0.0065, "6.5 per 1,000 node-days on RSC-1 (arXiv 2410.21680)")
    detect_seconds: Figure = Figure(300.0, "Slurm's default SlurmdTimeout, for a lost node; a dead rank shows at once")
    restart_seconds: Figure = Figure(222.0, "median recovery reported for OLMo Hybrid; waiting in a queue not counted")
    stall_seconds: Figure = Figure(0.78, "PyTorch DCP, asynchronous, 70B on 1,856 H200 (PyTorch's report)")
    durable_seconds: Figure = Figure(67.0, "PyTorch DCP, asynchronous, 70B on 1,856 H200 (PyTorch's report)")
    step_bench: StepBench | None = None
    not_in_time: tuple[str, ...] = ()

    def on_gpu(self, name: str | None) -> "Assumptions":
        """A copy with the data sheet of the GPU ``name``; by default of the one that a step was measured on, if it is
        known. Raises UserError for a GPU that is not known, or not the measured one."""
        if name is not None:
            data_sheet(name)
        bench = self.step_bench
        measured = known_gpu(bench.machine) if bench else None
        if bench and measured and name not in (None, measured):
            raise UserError(f"--gpu {name}: {bench.file} was measured on {bench.machine}; leave one of them out")
        gpu = name or measured or self.gpu
        return replace(self, gpu=gpu, **_of_gpu(gpu))

    def with_given(self, **values: float | None) -> "Assumptions":
        """A copy with the ``values``, by field name, that are not None. Raises UserError for an impossible value."""
        for name, value in values.items():
            least = 0.0 if name in ("failures_per_node_day", "detect_seconds", "restart_seconds") else 1e-9
            if value is not None and not (least <= value < float("inf")):
                raise UserError(f"{name.replace('_', ' ')} is {value:g}: give a number above 0")
        if (mfu := values.get("mfu")) is not None and mfu > 1:
            raise UserError(f"mfu is {mfu:g}: give a fraction of the peak, for example 0.4")
        return replace(self, **{k: Figure(v, "given") for k, v in values.items() if v is not None})

    def with_benchmarks(self, files: Sequence[str], state_bytes: int) -> "Assumptions":
        """A copy with the figures of reports of `fitv2 bench step --json` or `fitv2 bench checkpoint --json`. The time
        until a save is durable is scaled to ``state_bytes``, the size of a commit. Raises UserError for any other file.
        """
        found = self
        for file in files:
            report = _read_bench(file)
            if "flops_a_step" in report:
                found = replace(found, step_bench=_step_bench(file, report))
            else:
                on = f"measured on {report['ranks']} x {report['machine']} ({file})"
                scale = state_bytes / report["bytes"]
                scaled = (
                    "" if scale == 1 else f", for {state_bytes / 1e9:.3g} rather than {report['bytes'] / 1e9:.3g} GB"
                )
                stall = report["stall_seconds"]["median"]
                durable = max(stall, report["durable_seconds"]["median"] * scale)
                found = replace(found, stall_seconds=Figure(stall, on), durable_seconds=Figure(durable, on + scaled))
        return found

    def to_report(self) -> dict[str, Any]:
        """Value and source of each figure, for the report."""
        return {name: asdict(figure) for name, figure in vars(self).items() if isinstance(figure, Figure)}


_Positive = Annotated[float, Field(gt=0, lt=1e30, allow_inf_nan=False)]
_Ranks = Annotated[int, Field(gt=0, lt=1 << 31)]


class _Median(Shape):
    median: Seconds


class _Some(Shape):
    median: _Positive


class _StepReport(Shape):
    machine: str
    ranks: _Ranks
    images_per_second: _Positive
    seconds_a_step: _Some
    seconds_by_part: dict[str, Seconds] | None = None
    flops_a_step: _Positive
    fill: _Positive
    peak_tflops: _Positive | None
    layout: LayoutConfig | None = None
    deterministic: bool = False


class _SaveReport(Shape):
    machine: str
    ranks: _Ranks
    bytes: _Positive
    stall_seconds: _Median
    durable_seconds: _Median


def _read_bench(file: str) -> dict[str, Any]:
    try:
        report = parse_json(Path(file).read_bytes())
        of_a_step = isinstance(report, dict) and "flops_a_step" in report
        return (_StepReport if of_a_step else _SaveReport).check(report)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not a report of `fitv2 bench step --json` or `fitv2 bench checkpoint --json` ({error}): "
            "measure again, or leave it out"
        ) from error


def _step_bench(file: str, report: dict[str, Any]) -> StepBench:
    parts, seconds = report.get("seconds_by_part") or {}, report["seconds_a_step"]["median"]
    return StepBench(
        file,
        report["machine"],
        report["ranks"],
        report["images_per_second"] * seconds,
        seconds,
        min(parts.get("optimizer", 0.0) + parts.get("ema", 0.0), seconds / 2),
        report["flops_a_step"],
        report["fill"],
        report["peak_tflops"],
        LayoutConfig(**report["layout"]) if report.get("layout") else None,
        report.get("deterministic", False),
    )
