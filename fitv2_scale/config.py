"""The run's configuration: typed, frozen, read from YAML and ``key=value`` overrides.

It has two halves. *Science* (model, flow, data, optimizer, ema, trainable, seed) defines what the run computes
and is compared when a run is continued; everything else is *operations* and may differ in every attempt.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_sharding.errors import UserError
from data_sharding.plan import Views
from fitv2_scale.model.config import ModelConfig, parse_size
from fitv2_scale.model.flow import FlowConfig
from fitv2_scale.parallel.engine import OptimizerConfig, Precision

SCIENCE = ("model", "flow", "data", "optimizer", "ema", "trainable", "seed")
_READING = ("cache_gib", "prefetch_gib", "cache_dir", "cache_disk_gib", "deadline_seconds", "max_substituted")
# Where the data lies is free: which data it is, the plan hash says. Batch and weights may change during a run; the
# cursor in each commit keeps their history.
_NOT_SCIENCE = {"data": ("url", "weights", *_READING)}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    url: str | list[str] = Field(description="folder or URL of a dataset made by `fitv2 shard write`, or several")
    weights: list[float] | None = Field(
        None, description="share of the images of each dataset, if there are several; null: as they are large"
    )
    views: Views = Field(
        "mixed", description="mixed: images with a crop view use it half the time, as published; resize; crop"
    )
    cache_gib: float = Field(1.0, gt=0, description="memory per rank for decoded frames")
    prefetch_gib: float = Field(0.25, gt=0, description="memory per rank for frames and batches of steps to come")
    cache_dir: str = Field(
        "", description="folder on each node's own disk for frames as they are stored, shared by its ranks; empty: none"
    )
    cache_disk_gib: float = Field(32.0, gt=0, description="most that cache_dir may hold")
    deadline_seconds: float = Field(
        300.0, gt=0, le=400, description="how long a frame is asked for again before it counts as lost"
    )
    max_substituted: float = Field(
        1e-4, ge=0, lt=1, description="share of the images that may be replaced because they cannot be read; 0: none"
    )

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else self.url


class BatchConfig(_Section):
    images: int = Field(
        256,
        ge=1,
        description="images in every step, on any number of ranks; a change begins at a window boundary",
    )


class EMAConfig(_Section):
    decay: float = Field(0.9999, ge=0, lt=1, description="decay of the exponential moving average of the weights")


class TrainConfig(_Section):
    steps: int = Field(ge=1, description="optimizer steps of the whole run; may be raised later to go on")
    log_every: int = Field(10, ge=1, description="steps a journal entry covers")
    audit: bool = Field(False, description="record ids, times and noise digests of all that is trained on")
    max_skipped: int = Field(20, ge=1, description="steps in a row with a gradient that is not finite before giving up")


class LayoutConfig(_Section):
    engine: Literal["fsdp"] = Field("fsdp", description="fsdp: PyTorch FSDP2; HSDP when replicate > 1")
    replicate: int = Field(1, ge=1, description="copies of the sharded state; must divide the number of processes")
    precision: Precision = Field("bf16", description="of compute; master weights and reductions stay float32")
    max_tokens: int = Field(16384, ge=64, description="most tokens in a pack; the planner picks the capacity below it")
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile each block; auto: on CUDA only")


class CheckpointConfig(_Section):
    every_steps: int = Field(1000, ge=1, description="steps between commits")
    keep_last: int = Field(2, ge=1, description="newest commits to keep; older ones are retired, then deleted")


class TrackingConfig(_Section):
    uri: str = Field("auto", description="MLflow tracking URI; auto: a sqlite file beside the run; none: journal only")
    experiment: str = Field("fitv2", description="MLflow experiment")
    peak_tflops: float | None = Field(None, gt=0, description="peak of one device, for MFU; known GPUs need none")


class SamplingConfig(_Section):
    every_steps: int = Field(0, ge=0, description="steps between grids of pictures from the EMA weights; 0: none")
    sizes: list[str] = Field(["256x256"], description="HEIGHTxWIDTH in pixels, multiples of 16; one grid row each")
    columns: int = Field(8, ge=1, description="classes shown, spread evenly over all")
    cfg: float = Field(1.5, ge=1, description="classifier-free guidance scale; 1: none")
    steps: int = Field(50, ge=1, description="Euler steps")
    vae: str = Field("", description="folder of the AutoencoderKL (diffusers) that makes pictures of sd-vae latents")

    @field_validator("sizes")
    @classmethod
    def _sizes_are_tokens(cls, sizes: list[str]) -> list[str]:
        for size in sizes:
            try:
                parse_size(size)
            except UserError as error:
                raise ValueError(str(error)) from error
        return sizes


class Config(_Section):
    run: str = Field("", description="the RUN's folder: made by the first attempt, continued by the next ones")
    seed: int = Field(0, ge=0, lt=1 << 64, description="of all randomness: weights, order, noise, times, views")
    model: ModelConfig = Field(description="the network")
    flow: FlowConfig = Field(FlowConfig(), description="the training objective")
    data: DataConfig = Field(description="the dataset")
    batch: BatchConfig = Field(BatchConfig(), description="the step")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW")
    ema: EMAConfig = Field(EMAConfig(), description="the averaged weights that sampling uses")
    trainable: list[str] = Field(["*"], description="name patterns of the tensors to train, as in blocks.*.adaLN*")
    train: TrainConfig = Field(description="the run's length")
    layout: LayoutConfig = Field(LayoutConfig(), description="how the work is spread; changes nothing but the speed")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="commits")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")
    sampling: SamplingConfig = Field(SamplingConfig(), description="pictures while training")

    def science(self) -> dict[str, Any]:
        """The half that defines the run, as plain data."""
        plain = self.model_dump(mode="json", include=set(SCIENCE))
        return {
            key: {k: v for k, v in value.items() if k not in _NOT_SCIENCE[key]} if key in _NOT_SCIENCE else value
            for key, value in plain.items()
        }


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies ``key.path=value`` overrides, whose values are YAML too.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest right one) or a value of the wrong type.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml")))
        hint = f"; there are {known}" if known else ""
        raise UserError(f"cannot read the config {path}: {error.strerror}{hint}") from error
    tree = _parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of keys to values")
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not of the form key=value, as in train.steps=1000")
        _set(tree, key, _parse_yaml(value, override))
    return parse_config(tree, path)


def parse_config(tree: dict, where: str) -> Config:
    """Validates plain data. Raises UserError with one sentence that names the key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error.errors()[0])}") from None


def explain(config: Config) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, what it means) of every key, in order."""
    yield from _explain(config, "")


def _explain(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _explain(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _set(tree: dict, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"'{dotted}': {parent} is a value, not a section")
    tree[leaf] = value


def _sentence(error: dict) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        nearest = _nearest(path)
        return f"unknown key {key}" + (f", did you mean {nearest}?" if nearest else "")
    if error["type"] == "missing":
        return f"{key} is missing: give it in the file or as {key}=…"
    return f"{key} = {error['input']!r}: {error['msg'].removeprefix('Value error, ')}" if key else error["msg"]


def _nearest(path: list[str]) -> str | None:
    keys = _all_keys(Config, "")
    by_path = difflib.get_close_matches(".".join(path), keys, n=1, cutoff=0.6)
    by_name = [
        k for k in keys if k.split(".")[-1] in difflib.get_close_matches(path[-1], [k.split(".")[-1] for k in keys])
    ]
    return (by_path or by_name or [None])[0]


def _all_keys(section: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys
