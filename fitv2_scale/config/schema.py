"""The run's configuration: typed, frozen, read from YAML and ``key=value`` overrides.

It has two halves. *Science* (model, flow, data, optimizer, ema, trainable, seed, init_from) defines what the run
computes and is compared when a run is continued; everything else is *operations* and may differ in every attempt.
"""

import copy
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.policy import CheckpointConfig
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.sections import (
    BatchConfig,
    DataConfig,
    EMAConfig,
    LayoutConfig,
    ProfileConfig,
    SamplingConfig,
    Section,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
from fitv2_scale.config.slurm import SlurmConfig
from fitv2_scale.model.flow import FlowConfig
from fitv2_scale.parallel.engine import OptimizerConfig
from fitv2_scale.train.watchdog import WatchdogConfig

SCIENCE = ("model", "flow", "data", "optimizer", "ema", "trainable", "seed")
_READING = ("cache_gib", "prefetch_gib", "cache_dir", "cache_disk_gib", "deadline_seconds", "max_substituted")
# Where the data lies is free: which data it is, the plan hash says. Batch and weights may change during a run; the
# cursor in each commit keeps their history.
_NOT_SCIENCE = {"data": ("url", "weights", *_READING)}


class Config(Section):
    run: str = Field("", description="the RUN's folder: made by the first attempt, continued by the next ones")
    seed: int = Field(0, ge=0, lt=1 << 64, description="of all randomness: weights, order, noise, times, views")
    init_from: str = Field(
        "", description="what a new run begins with: RUN@STEP (its EMA weights), or a file of weights; empty: nothing"
    )
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
    validation: ValidationConfig = Field(ValidationConfig(), description="loss on held-out images while training")
    sampling: SamplingConfig = Field(SamplingConfig(), description="pictures while training")
    profile: ProfileConfig = Field(ProfileConfig(), description="where the time and the memory of steps go")
    watchdog: WatchdogConfig = Field(WatchdogConfig(), description="when a rank that gets no further ends the attempt")
    slurm: SlurmConfig = Field(SlurmConfig(), description="how `fitv2 submit` asks your cluster for jobs")

    @model_validator(mode="after")
    def _layout_suits_the_model(self):
        layout, heads = self.layout, self.model.heads
        if heads % layout.tensor:
            raise ValueError(f"layout.tensor is {layout.tensor}, which does not divide the {heads} heads of the model")
        if layout.engine == "zero3" and layout.replicate not in ("auto", 1):
            raise ValueError(
                f"layout.replicate is {layout.replicate}, but zero3 keeps one copy: use layout.engine=fsdp"
            )
        return self

    def science(self) -> dict[str, Any]:
        """The half that defines the run, as plain data."""
        plain = self.model_dump(mode="json", include={*SCIENCE, *(["init_from"] if self.init_from else [])})
        return {
            key: {k: v for k, v in value.items() if k not in _NOT_SCIENCE[key]} if key in _NOT_SCIENCE else value
            for key, value in plain.items()
        }


class _SlurmAlone(Section):
    slurm: SlurmConfig = SlurmConfig()


class _Loader(yaml.SafeLoader):
    """YAML in which 5:20 is text; to YAML 1.1 it is a number of base 60."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int | str:
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


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
    return parse_config(tree, path, overrides)


def load_slurm(overrides: list[str]) -> SlurmConfig:
    """The section ``slurm`` alone, from ``slurm.key=value`` overrides. Raises UserError."""
    tree: dict = {}
    _override(tree, overrides)
    try:
        return _SlurmAlone.model_validate(tree).slurm
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0])) from None


def parse_config(tree: dict, where: str, overrides: list[str] | None = None) -> Config:
    """Validates plain data, with overrides as for ``load_config``. Raises UserError with one sentence that names the
    key."""
    tree = copy.deepcopy(tree)
    _override(tree, overrides or [])
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


def _override(tree: dict, overrides: list[str]) -> None:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not of the form key=value, as in train.steps=1000")
        _set(tree, key, _parse_yaml(value, override))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
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
    message = error["msg"].removeprefix("Value error, ")
    return f"{key} = {error['input']!r}: {message}" if key else message


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
