"""The sections of a run's configuration without a module of their own: what a step trains on (``data``, ``batch``), how
it is trained (``optimizer``, ``ema``, ``train``), what is recorded (``tracking``, ``profile``, ``validation``,
``sampling``), and what keeps a run alive (``checkpoint``, ``watchdog``)."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data_sharding.plan.view_choice import Views
from fitv2_scale.config.model import AttentionScale, Mode, SincosMode
from fitv2_scale.config.section import Section
from fitv2_scale.config.solvers import DDPM_LEVELS


class DataConfig(Section):
    url: str | list[str] = Field(description="folder or URL of a dataset written by `fitv2 shard write`, or a list")
    weights: list[float] | None = Field(
        None, description="relative weight of each dataset in a list; null: in proportion to their images"
    )
    views: Views = Field(
        "mixed", description="mixed: images with a crop view use it half the time, as published; or always resize, crop"
    )
    cache_gib: float = Field(
        2.5,
        gt=0,
        description="GiB of memory per rank for decoded frames; a window of 256-token ImageNet takes 2.1",
    )
    prefetch_gib: float = Field(0.25, gt=0, description="GiB of memory per rank for prefetched frames and batches")
    cache_dir: str = Field(
        "", description="folder on the local disk of each node where its ranks cache frames as stored; empty: none"
    )
    cache_disk_gib: float = Field(32.0, gt=0, description="maximum GiB in cache_dir")
    deadline_seconds: float = Field(
        300.0,
        gt=0,
        le=400,
        description="seconds for which reading a frame is retried; then training saves and ends with 75",
    )
    max_substituted: float = Field(
        1e-4,
        ge=0,
        lt=1,
        description="fraction of images that may be substituted if they cannot be read; 0: none",
    )

    @field_validator("url")
    @classmethod
    def _some_dataset(cls, url: str | list[str]) -> str | list[str]:
        if not url or (isinstance(url, list) and "" in url):
            raise ValueError("give the folder or URL of a dataset")
        return url

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else self.url


class BatchConfig(Section):
    images: int = Field(
        256,
        ge=1,
        description="images per step, on any number of ranks; a change takes effect at a window boundary",
    )


class EMAConfig(Section):
    decay: float = Field(0.9999, ge=0, lt=1, description="decay of the exponential moving average of the weights")


class TrainConfig(Section):
    steps: int = Field(ge=1, description="optimizer steps of the whole run; raise it to continue a finished run")
    log_every: int = Field(10, ge=1, description="steps per journal entry")
    audit: bool = Field(False, description="record id, time, label and digests of each image as trained on")
    max_skipped: int = Field(
        20, ge=1, description="steps in a row with a non-finite loss or gradient after which training ends with 93"
    )
    spike_sigma: float = Field(
        6.0, ge=0, description="report a loss this many standard deviations above its running mean; 0: report none"
    )


class TrackingConfig(Section):
    uri: str = Field("auto", description="MLflow tracking URI; auto: a sqlite file beside the run; none: journal only")
    experiment: str = Field("fitv2", description="name of the MLflow experiment")
    peak_tflops: float | None = Field(None, gt=0, description="peak of one device, for MFU; null: that of known GPUs")


class ProfileConfig(Section):
    steps: str = Field(
        "", description="a:b profiles rank 0 from step a + 1 to step b, into attempts/<n>/profile; empty: no profile"
    )

    @field_validator("steps")
    @classmethod
    def _steps_are_a_range(cls, steps: str) -> str:
        first, colon, last = steps.partition(":")
        if steps and not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError("give a:b with a < b, as in 100:103 for the three steps after step 100")
        return steps

    @property
    def range(self) -> range:
        """The steps to profile, counted from 0."""
        return range(*map(int, self.steps.split(":"))) if self.steps else range(0)


class ValidationConfig(Section):
    every_steps: int = Field(
        0, ge=0, description="steps between validations of raw and EMA weights, plus one at the end; 0: none"
    )
    url: str | list[str] = Field(
        "", description="dataset of held-out images, or a list; empty: the images that --holdout set aside"
    )
    images: int = Field(256, ge=1, description="maximum number of held-out images, the same every time")
    timesteps: int = Field(8, ge=1, description="times t at which each image is evaluated, evenly spaced over (0, 1)")

    @property
    def urls(self) -> list[str]:
        return [self.url] if self.url and isinstance(self.url, str) else list(self.url)


class SamplingConfig(Section):
    every_steps: int = Field(0, ge=0, description="steps between image grids from the EMA weights; 0: none")
    sizes: list[str] = Field(
        ["256x256"], description="HEIGHTxWIDTH in pixels, multiples of 8 times model.patch; a grid row each"
    )
    columns: int = Field(8, ge=1, description="number of classes shown, spread evenly over all")
    cfg: float = Field(1.5, ge=1, description="classifier-free guidance scale; 1: none")
    guided_channels: Literal["all", "three"] = Field(
        "all", description="latent channels that guidance applies to; three: the first three of four, as released"
    )
    guidance_interval: list[float] = Field(
        [0.0, 1.0],
        description="times [t0, t1] between which there is guidance, from 0, noise, to 1, data; elsewhere cfg is 1",
    )
    solver: Literal["euler", "heun", "dopri5", "sde", "ddpm", "ddim"] = Field(
        "euler",
        description="of a flow: euler, heun: fixed steps; dopri5: adaptive steps per image; sde: SiT's stochastic "
        "sampler; of ddpm: ddpm: ancestral sampling; ddim: without noise",
    )
    steps: int = Field(50, ge=1, description="number of steps of all solvers but dopri5; ddim's must divide 1000")
    atol: float = Field(1e-6, gt=0, description="absolute tolerance of dopri5")
    rtol: float = Field(1e-3, gt=0, description="relative tolerance of dopri5")
    rope: Literal["auto", Mode] = Field(
        "auto", description="RoPE of large images, as model.rope.mode; auto: as published for each size"
    )
    attention_scale: Literal["auto", AttentionScale] = Field(
        "auto", description="as model.rope.attention_scale; auto: as published if rope is auto, else none"
    )
    sincos: Literal["auto", SincosMode] = Field("auto", description="as model.sincos.mode; auto: the model's own")
    vae: str = Field("", description="folder of the diffusers AutoencoderKL that decodes sd-vae latents")

    @field_validator("sizes")
    @classmethod
    def _has_a_size(cls, sizes: list[str]) -> list[str]:
        if not sizes:
            raise ValueError("give at least one size, as in [256x256]; sampling.every_steps=0 samples none")
        return sizes

    @field_validator("guidance_interval")
    @classmethod
    def _interval_is_one(cls, interval: list[float]) -> list[float]:
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError("give [t0, t1] with 0 <= t0 < t1 <= 1, as in [0.2, 0.8]; cfg=1 guides nowhere")
        return interval

    @model_validator(mode="after")
    def _steps_suit_the_solver(self):
        if self.solver == "ddim" and (self.steps == 1 or DDPM_LEVELS % self.steps):
            raise ValueError(
                f"steps is {self.steps}, and ddim takes equal strides through {DDPM_LEVELS} levels of noise: give a "
                f"divisor of {DDPM_LEVELS}, as in 50, 100 or 250"
            )
        if self.solver == "ddpm" and not 2 <= self.steps <= DDPM_LEVELS:
            raise ValueError(f"steps is {self.steps}: give 2 to {DDPM_LEVELS} steps for solver=ddpm, as in 250")
        return self


_LEAST_KEPT = 2  # newest sound commits that are never deleted, whatever the config says


class CheckpointConfig(Section):
    every_steps: int = Field(1000, ge=1, description="steps between commits")
    every_minutes: float | None = Field(
        None, gt=0, description="minutes between commits, instead of every_steps; `fitv2 plan` recommends a value"
    )
    keep_last: int = Field(
        2, ge=_LEAST_KEPT, description="newest commits to keep; older ones are retired, then deleted"
    )
    keep_every: int = Field(0, ge=0, description="commits at multiples of this step are made and kept forever; 0: none")
    milestones: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="commits at these steps are made and kept forever"
    )
    max_failed: int = Field(
        3,
        ge=1,
        description="failed saves in a row after which training ends with 75; until then it retries when a save is due",
    )

    def keeps(self, step: int) -> bool:
        """Whether the commit at ``step`` is kept forever."""
        return step in self.milestones or (self.keep_every > 0 and step % self.keep_every == 0)


class WatchdogConfig(Section):
    step_factor: float = Field(3.0, gt=1, description="limit of a step: this many times the longest recent step")
    step_seconds: float = Field(
        30.0, gt=0, description="lower bound of that limit; also how long a rank may send no heartbeat"
    )
    compile_seconds: float = Field(1800.0, gt=0, description="limit of each of the first steps, which compile")
    load_seconds: float = Field(1800.0, gt=0, description="limit for building the model and reading a commit")
    data_seconds: float = Field(900.0, gt=0, description="limit for waiting for a batch; above data.deadline_seconds")
    save_seconds: float = Field(1800.0, gt=0, description="limit for making a commit")
    evaluate_seconds: float = Field(1800.0, gt=0, description="limit for sampling and validation during training")


class OptimizerConfig(Section):
    """AdamW, with linear warm-up to a constant learning rate."""

    lr: float = Field(1e-4, gt=0, description="learning rate after warm-up; never scaled by the batch or the ranks")
    warmup_steps: int = Field(5000, ge=0, description="optimizer steps of linear warm-up")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm; 1e9 clips none")

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lr
