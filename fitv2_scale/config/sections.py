"""The sections of a run's configuration that belong to no other room; ``config`` puts all of them together."""

from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from data_sharding.errors import UserError
from data_sharding.plan.plan import Views
from fitv2_scale.config.model import AttentionScale, Mode, parse_size
from fitv2_scale.config.section import Section

S = TypeVar("S", bound=Section)


class DataConfig(Section):
    url: str | list[str] = Field(description="folder or URL of a dataset made by `fitv2 shard write`, or several")
    weights: list[float] | None = Field(
        None, description="share of the images of each dataset, if there are several; null: as they are large"
    )
    views: Views = Field(
        "mixed", description="mixed: images with a crop view use it half the time, as published; resize; crop"
    )
    cache_gib: float = Field(
        2.5,
        gt=0,
        description="memory per rank for decoded frames; a window of 256-token ImageNet takes 2.1",
    )
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


class BatchConfig(Section):
    images: int = Field(
        256,
        ge=1,
        description="images in every step, on any number of ranks; a change begins at a window boundary",
    )


class EMAConfig(Section):
    decay: float = Field(0.9999, ge=0, lt=1, description="decay of the exponential moving average of the weights")


class TrainConfig(Section):
    steps: int = Field(ge=1, description="optimizer steps of the whole run; may be raised later to go on")
    log_every: int = Field(10, ge=1, description="steps a journal entry covers")
    audit: bool = Field(False, description="record ids, times and noise digests of all that is trained on")
    max_skipped: int = Field(
        20, ge=1, description="steps in a row with a loss or gradient that is not finite before giving up"
    )
    spike_sigma: float = Field(
        6.0, ge=0, description="a loss this many deviations above its running mean is reported, no more; 0: none is"
    )


class TrackingConfig(Section):
    uri: str = Field("auto", description="MLflow tracking URI; auto: a sqlite file beside the run; none: journal only")
    experiment: str = Field("fitv2", description="MLflow experiment")
    peak_tflops: float | None = Field(None, gt=0, description="peak of one device, for MFU; known GPUs need none")


class ProfileConfig(Section):
    steps: str = Field(
        "", description="a:b profiles the first rank, in the steps after a up to b, into attempts/<n>/profile"
    )

    @field_validator("steps", mode="before")
    @classmethod
    def _steps_are_a_range(cls, steps: object) -> str:
        first, colon, last = str(steps).partition(":")
        if steps != "" and not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError("give a:b with a < b, as in 100:103 for the three steps after step 100")
        return str(steps)

    @property
    def range(self) -> range:
        """The steps to profile, counted from 0."""
        return range(*map(int, self.steps.split(":"))) if self.steps else range(0)


class ValidationConfig(Section):
    every_steps: int = Field(
        0, ge=0, description="steps between validations of raw and EMA weights, and one at the end; 0: none"
    )
    url: str | list[str] = Field(
        "", description="dataset of held-out images, or several; empty: what --holdout set aside of data.url"
    )
    images: int = Field(256, ge=1, description="most held-out images that are looked at, always the same")
    timesteps: int = Field(8, ge=1, description="times at which each is looked at, evenly spaced over (0, 1)")

    @property
    def urls(self) -> list[str]:
        return [self.url] if self.url and isinstance(self.url, str) else list(self.url)


class SamplingConfig(Section):
    every_steps: int = Field(0, ge=0, description="steps between grids of pictures from the EMA weights; 0: none")
    sizes: list[str] = Field(["256x256"], description="HEIGHTxWIDTH in pixels, multiples of 16; one grid row each")
    columns: int = Field(8, ge=1, description="classes shown, spread evenly over all")
    cfg: float = Field(1.5, ge=1, description="classifier-free guidance scale; 1: none")
    guided_channels: Literal["all", "three"] = Field(
        "all", description="latent channels that guidance applies to; three: the first three of four, as released"
    )
    solver: Literal["euler", "heun", "dopri5", "sde"] = Field(
        "euler", description="euler, heun: even steps; dopri5: adaptive, each image its own; sde: SiT's stochastic path"
    )
    steps: int = Field(50, ge=1, description="of euler, heun and sde")
    atol: float = Field(1e-6, gt=0, description="absolute tolerance of dopri5")
    rtol: float = Field(1e-3, gt=0, description="relative tolerance of dopri5")
    rope: Literal["auto", Mode] = Field(
        "auto", description="positions of large images, as model.rope.mode; auto: as published for each size"
    )
    attention_scale: Literal["auto", AttentionScale] = Field(
        "auto", description="as model.rope.attention_scale; auto: as published where rope is auto, else none"
    )
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


def with_changes(section: S, changes: dict[str, Any]) -> S:
    """``section`` with other values, validated. Raises UserError with one sentence that names the key."""
    try:
        return type(section).model_validate(section.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise UserError(f"{key} = {first['input']!r}: {message}") from None


_SAFE = 2  # so many of the newest sound commits are never deleted, whatever the config says


class CheckpointConfig(Section):
    every_steps: int = Field(1000, ge=1, description="steps between commits")
    every_minutes: float | None = Field(
        None, gt=0, description="minutes between commits, instead of every_steps; `fitv2 plan` recommends a value"
    )
    keep_last: int = Field(2, ge=_SAFE, description="newest commits to keep; older ones are retired, then deleted")
    keep_every: int = Field(0, ge=0, description="commits at its multiples are made and kept for ever; 0: none")
    milestones: list[int] = Field([], description="commits at these steps are made and kept for ever")
    max_failed: int = Field(
        3,
        ge=1,
        description="saves in a row that may fail until training ends with 75; the next is made when it is due",
    )

    def keeps(self, step: int) -> bool:
        """Whether the commit at ``step`` is kept for ever."""
        return step in self.milestones or (self.keep_every > 0 and step % self.keep_every == 0)


class WatchdogConfig(Section):
    step_factor: float = Field(3.0, gt=1, description="a step may take so many times the longest of the last ones")
    step_seconds: float = Field(
        30.0, gt=0, description="and always as long as this; also how long a rank may be silent"
    )
    compile_seconds: float = Field(1800.0, gt=0, description="limit of each of the first steps")
    load_seconds: float = Field(1800.0, gt=0, description="limit of building the model and reading a commit")
    data_seconds: float = Field(900.0, gt=0, description="limit of waiting for a batch; over data.deadline_seconds")
    save_seconds: float = Field(1800.0, gt=0, description="limit of a commit")
    evaluate_seconds: float = Field(1800.0, gt=0, description="limit of making pictures")


class OptimizerConfig(Section):
    """AdamW, with linear warm-up to a constant learning rate."""

    lr: float = Field(1e-4, gt=0, description="learning rate after warm-up; never scaled by the batch or the ranks")
    warmup_steps: int = Field(5000, ge=0, description="optimizer steps of linear warm-up")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lr
