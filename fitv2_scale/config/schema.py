"""The run's configuration: typed, frozen, read from YAML and ``key=value`` overrides.

It has two halves. The *recipe* (model, objective, flow, ddpm, data, optimizer, ema, trainable, seed, init_from,
init_new) defines what the run computes and is compared when a run is continued; everything else is *runtime* and may
differ in every attempt.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field, model_validator

from data_sharding.errors import UserError
from fitv2_scale.config.defaults import unknown_keys, with_defaults
from fitv2_scale.config.layout import LayoutConfig
from fitv2_scale.config.model import CLASS_TABLE, DdpmConfig, FlowConfig, ModelConfig, parse_size
from fitv2_scale.config.section import Section
from fitv2_scale.config.sections import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    OptimizerConfig,
    ProfileConfig,
    SamplingConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
    WatchdogConfig,
)
from fitv2_scale.config.slurm import SlurmConfig
from fitv2_scale.config.solvers import misfit

RECIPE = ("model", "objective", "flow", "ddpm", "data", "optimizer", "ema", "trainable", "seed")
_IF_GIVEN = ("init_from", "init_new")  # also of the recipe, which has them only where they are set
_READING = ("cache_gib", "prefetch_gib", "cache_dir", "cache_disk_gib", "deadline_seconds", "max_substituted")
# Where the data lies is free: which data it is, the plan hash says. Batch and weights may change during a run; the
# cursor in each commit keeps their history.
_RUNTIME = {"data": ("url", "weights", *_READING)}
_FLOAT8_SIZES = 16  # sizes of products in fp8 are multiples: a GPU reads 16 bytes at once


class Config(Section):
    run: str = Field("", description="folder or s3:// URL of the RUN; the first attempt makes it")
    seed: int = Field(0, ge=0, lt=1 << 64, description="seed of initial weights, data order, noise, times and views")
    init_from: str = Field(
        "", description="initial weights of a new run: RUN@STEP (its EMA weights) or a weights file; empty: random ones"
    )
    init_new: list[str] = Field(
        [],
        description="name patterns of tensors that are drawn instead of taken from init_from; the table of other "
        f"classes is {CLASS_TABLE}",
    )
    model: ModelConfig = Field(description="the network")
    objective: Literal["flow", "ddpm"] = Field(
        "flow",
        description="what the network learns: flow, the velocity of a rectified flow, as FiTv2 and SiT do; ddpm, the "
        "noise at one of 1000 levels, and the variance of a step if the network has outputs for it, as DiT and FiT do",
    )
    flow: FlowConfig = Field(FlowConfig(), description="the training objective flow")
    ddpm: DdpmConfig = Field(DdpmConfig(), description="the training objective ddpm")
    data: DataConfig = Field(description="the dataset")
    batch: BatchConfig = Field(BatchConfig(), description="what a step trains on")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW")
    ema: EMAConfig = Field(EMAConfig(), description="the averaged weights, which sampling uses")
    trainable: list[str] = Field(["*"], description="name patterns of the trained tensors, as in blocks.*.adaLN*")
    train: TrainConfig = Field(description="the run's length")
    layout: LayoutConfig = Field(LayoutConfig(), description="how the work is divided; changes only the speed")
    deterministic: bool = Field(
        False,
        description="train with kernels that give equal bits each time; needed on GPUs, for images above 256 tokens",
    )
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when commits are made and kept")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")
    validation: ValidationConfig = Field(ValidationConfig(), description="loss on held-out images")
    sampling: SamplingConfig = Field(SamplingConfig(), description="images sampled during training")
    profile: ProfileConfig = Field(ProfileConfig(), description="time and memory of single steps")
    watchdog: WatchdogConfig = Field(WatchdogConfig(), description="time limits that detect a hung rank")
    slurm: SlurmConfig = Field(SlurmConfig(), description="how `fitv2 submit` requests jobs")

    @model_validator(mode="after")
    def _sections_suit_one_another(self):
        """Names all that is wrong at once: who mends one fault should not meet the next."""
        of_layout = [*_engine_problems(self), *_float8_problems(self), *_flash4_problems(self)]
        if problems := [*of_layout, *_solver_problems(self), *_position_problems(self)]:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _sizes_are_tokens_of_the_model(self):
        for size in self.sampling.sizes:
            try:
                parse_size(size, self.model.pixels_per_token)
            except UserError as error:
                raise ValueError(f"sampling.sizes: {error}") from error
        return self

    @model_validator(mode="after")
    def _draws_instead_of_loading(self):
        if self.init_new and not self.init_from:
            raise ValueError("init_new is for init_from, and without it all tensors are drawn: leave it out")
        return self

    @property
    def has_new_classes(self) -> bool:
        """Whether the table of classes is drawn, so that init_from may have learned others."""
        return any(fnmatchcase(CLASS_TABLE, pattern) for pattern in self.init_new)

    def recipe(self) -> dict[str, Any]:
        """The half that defines the run, as plain data; ``run.run.recipe_hash`` is its digest."""
        plain = self.model_dump(mode="json", include={*RECIPE, *(key for key in _IF_GIVEN if getattr(self, key))})
        return _without_runtime(plain)

    @classmethod
    def complete_recipe(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """A recipe of this or another version, with all keys of this one: what it does not name has its default.

        Raises UserError if it has keys that this version does not know.
        """
        if unknown := unknown_keys(cls, stored):
            flat = "is no key" if len(unknown) == 1 else "are no keys"
            raise UserError(
                f"{', '.join(unknown)} {flat} of this version: continue the run with the version that made it "
                "(attempts/<n>/start.json names it), or fork it with --fork-from RUN@STEP"
            )
        whole = with_defaults(cls, stored)
        return _without_runtime({key: whole[key] for key in (*RECIPE, *_IF_GIVEN) if key in whole})


def _engine_problems(config: Config) -> Iterator[str]:
    layout, heads = config.layout, config.model.heads
    if heads % layout.tensor:
        yield f"layout.tensor is {layout.tensor}, which does not divide the {heads} heads of the model"
    if layout.gate_and_value == "merged" and config.model.mlp == "gelu":
        yield "layout.gate_and_value=merged is for a SwiGLU, and model.mlp is gelu: leave it out"
    if layout.engine != "zero3":
        return
    if layout.replicate not in ("auto", 1):
        yield f"layout.replicate is {layout.replicate}, but zero3 keeps one copy: use layout.engine=fsdp"
    if given := layout.for_fsdp_alone:
        verb, them = ("is", "it") if len(given) == 1 else ("are", "them")
        yield f"{' and '.join(given)} {verb} for layout.engine=fsdp: leave {them} out with zero3"


def _float8_problems(config: Config) -> Iterator[str]:
    layout, sizes = config.layout, (config.model.hidden, config.model.mlp_hidden)
    if layout.precision != "fp8":
        return
    if layout.engine != "fsdp" or layout.tensor != 1:
        yield "layout.precision=fp8 is for layout.engine=fsdp and layout.tensor=1: set these, or use bf16"
    if layout.pad_to_multiple_of % _FLOAT8_SIZES:
        yield (
            f"layout.precision=fp8 needs packs of a multiple of {_FLOAT8_SIZES} tokens: set "
            f"layout.pad_to_multiple_of={_FLOAT8_SIZES}"
        )
    if any(size % _FLOAT8_SIZES for size in sizes):
        yield (
            f"layout.precision=fp8 needs widths that are multiples of {_FLOAT8_SIZES}, and this network's are "
            f"{sizes[0]} and {sizes[1]} (MLP): set layout.precision=bf16"
        )


def _flash4_problems(config: Config) -> Iterator[str]:
    if config.layout.attention != "flash4":
        return
    if config.layout.precision == "fp32":
        # On which GPU it will train is not known here; who has no such GPU should be told before it is.
        yield (
            "layout.attention=flash4 does not compute in float32: set layout.precision=bf16 on a Hopper or Blackwell "
            "GPU, and layout.attention=auto on any other device"
        )
    if config.deterministic:
        yield (
            "deterministic=true is not for layout.attention=flash4, which is not known to give equal bits each time: "
            "leave one of them out"
        )


def _position_problems(config: Config) -> Iterator[str]:
    sampling, position = config.sampling, config.model.position
    given = {
        "sincos": {"sincos": sampling.sincos},
        "rope": {"rope": sampling.rope, "attention_scale": sampling.attention_scale},
    }
    for kind, keys in given.items():
        for key, value in keys.items():
            if kind != position and value not in ("auto", "none"):
                yield f"sampling.{key}={value} is for model.position={kind}, and it is {position}: leave it out"


def _solver_problems(config: Config) -> Iterator[str]:
    """Of a solver that is not used, there are none."""
    if config.sampling.every_steps and (problem := misfit(config.sampling.solver, config.objective)):
        yield problem


def _without_runtime(plain: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {k: v for k, v in value.items() if k not in _RUNTIME[key]} if key in _RUNTIME else value
        for key, value in plain.items()
    }
