"""What was predicted of one H200 before there was one, for the commit a2e80d5: from the kernels that torch 2.11
compiles for it, the bytes that they move, and guessed rates of products and attention. None of it was measured.

A prediction without a range was a single figure.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    figure: str
    path: tuple[str, ...]  # where it stands among the results: a job, then keys of what it measured
    low: float | None
    high: float | None
    over: tuple[str, ...] | None = None  # the figure is divided by this one


_STEP, _PROFILE, _CEILINGS = "3B/2, 256 images", "profile of 3B/2", "ceilings"
_PEAK, _PLANNED = ("peak_bytes",), ("planned_peak_bytes",)
_SECONDS = ("seconds_a_step", "median")


def _share(kind: str, percent: float) -> Prediction:
    return Prediction(f"share of {kind} in that step, %", (_PROFILE, "percent", kind), percent, percent)


PREDICTIONS = (
    Prediction("products of a block at 15,752 tokens, TFLOP/s", (_CEILINGS, "products", "15752", "all"), 640, 720),
    Prediction(
        "of these the weight gradient of proj",
        (_CEILINGS, "products", "15752", "attn.proj", "weight gradient"),
        None,
        520,
    ),
    Prediction(
        "attention at head_dim 96, µs a token and block",
        (_CEILINGS, "attention", "head_dim 96", "us a token and block"),
        0.06,
        0.06,
    ),
    Prediction("norm, AdamW and EMA of 3B/2, ms", (_CEILINGS, "update", "ms"), 34, 40),
    Prediction("a step of 3B/2 with 256 images, s", (_STEP, *_SECONDS), 1.95, 2.25),
    Prediction("its MFU", (_STEP, "mfu"), 0.44, 0.51),
    Prediction("synchronisations in it", (_STEP, "syncs_in_a_step"), 0, 0),
    Prediction("its peak of memory, GB", (_STEP, *_PEAK), 112.2e9, 124.0e9),
    Prediction("its peak over the planned one", (_STEP, *_PEAK), 0.95, 1.05, (_STEP, *_PLANNED)),
    _share("products", 68.5),
    _share("compiled elementwise", 13.5),
    _share("attention", 7.8),
    _share("copies", 6.4),
    _share("optimizer", 1.8),
    Prediction(
        "time of the released way over ours",
        ("3B/2 beside the released way", "reference", "times_as_long", "median"),
        1.5,
        1.7,
    ),
    Prediction("MFU of XL/2 with 256 images", ("XL/2, 256 images", "mfu"), 0.35, 0.35),
    Prediction("the same with 16", ("XL/2, 16 images", "mfu"), None, 0.23),
    Prediction("MFU of 3B/2 with 64 images", ("3B/2, 64 images", "mfu"), 0.433, 0.467),
    Prediction("the same with 16", ("3B/2, 16 images", "mfu"), 0.30, 0.30),
    Prediction(
        "step of 3B/2 with selective checkpointing over the step with none",
        ("3B/2, selective checkpointing", *_SECONDS),
        1.015,
        1.015,
        (_STEP, *_SECONDS),
    ),
    *(
        Prediction(
            f"peak of XL/2 with 64 images over the planned one, {how}", (job, *_PEAK), 0.95, 1.05, (job, *_PLANNED)
        )
        for how in ("none", "selective", "full")
        for job in [f"XL/2, 64 images, {how}"]
    ),
    Prediction(
        "equal bits of attention's gradients each time, images of 246 tokens",
        (_CEILINGS, "attention", "head_dim 96", "same bits each time"),
        1,
        1,
    ),
    Prediction("the same with 1,024 tokens", (_CEILINGS, "attention", "1,024 tokens", "same bits each time"), 0, 0),
    Prediction(
        "the same, deterministic",
        (_CEILINGS, "attention", "1,024 tokens, deterministic", "same bits each time"),
        1,
        1,
    ),
)
