"""The run's configuration: typed, frozen, read from YAML and ``key=value`` overrides.

It has two halves. The *recipe* (model, flow, data, optimizer, ema, trainable, seed, init_from) defines what the run
computes and is compared when a run is continued; everything else is *runtime* and may differ in every attempt.
"""

from typing import Any

from pydantic import Field, model_validator

from fitv2_scale.config.layout import LayoutConfig
from fitv2_scale.config.model import FlowConfig, ModelConfig
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

RECIPE = ("model", "flow", "data", "optimizer", "ema", "trainable", "seed")
_READING = ("cache_gib", "prefetch_gib", "cache_dir", "cache_disk_gib", "deadline_seconds", "max_substituted")
# Where the data lies is free: which data it is, the plan hash says. Batch and weights may change during a run; the
# cursor in each commit keeps their history.
_RUNTIME = {"data": ("url", "weights", *_READING)}


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

    def recipe(self) -> dict[str, Any]:
        """The half that defines the run, as plain data; ``run.run.recipe_hash`` is its digest."""
        plain = self.model_dump(mode="json", include={*RECIPE, *(["init_from"] if self.init_from else [])})
        return {
            key: {k: v for k, v in value.items() if k not in _RUNTIME[key]} if key in _RUNTIME else value
            for key, value in plain.items()
        }
