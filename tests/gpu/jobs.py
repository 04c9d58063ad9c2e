"""The four parts: what each of them runs, in which order, and for how long at most.

A part is to end in less than ten minutes. What matters most comes first, for what no time is left for is left out.
"""

from dataclasses import dataclass, replace

B3, XL2, B2 = (f"configs/fitv2_{name}.yaml" for name in ("3b2", "xl2", "b2"))
IMAGENET = {"data.url": "preset:imagenet256"}
# What a dry run has instead, on a CPU: the same commands with the smallest network, and images of the same sizes.
_SMALL = {"model.depth": "1", "model.hidden": "32", "model.heads": "2", "batch.images": "2"}
_SMALL |= {"layout.max_tokens": "1024", "layout.precision": "fp32", "layout.compile": "false"}
_SMALL["layout.attention"] = "auto"
_DRY = 300.0  # seconds a job, on a machine that may be busy

# Ways of training 3B/2 that a config can ask for, beside the one of its file.
_FASTER = {"layout.reshard_after_forward": "never", "layout.gate_and_value": "merged"}
LEVERS = {
    "weights once a step, gate and value as one": _FASTER,
    "the same with written kernels": _FASTER | {"layout.kernels": "triton"},
    "selective checkpointing": {"layout.checkpointing": "selective"},
    "fp8": {"layout.precision": "fp8", "layout.pad_to_multiple_of": "16"},
    "FlashAttention 4": {"layout.attention": "flash4"},
}


@dataclass(frozen=True)
class Job:
    name: str  # what its result is found by, in all parts
    seconds: float  # at most
    words: tuple[str, ...]  # behind Python's name on the command line
    is_pytest: bool = False  # else it prints JSON


def parts(dry: bool) -> dict[str, list[Job]]:
    """The jobs of each part. ``dry``: in sizes for a CPU."""
    made = {"1": _first(dry), "2": _second(dry), "3": _third(dry), "4": _fourth(dry)}
    return {part: [replace(job, seconds=_DRY) if dry else job for job in jobs] for part, jobs in made.items()}


def _first(dry: bool) -> list[Job]:
    nothing_kept = {"layout.checkpointing": "none"}
    return [
        *_MACHINE,
        Job("ceilings", 90, ("-m", "tests.gpu.ceilings", *["--tiny"] * dry)),
        _tests("GPU tests", 120, "not peak"),
        _step("3B/2, 256 images", 200, dry, B3, nothing_kept, steps=2),
        Job("profile of 3B/2", 150, ("-m", "tests.gpu.step_profile", B3, *_overrides(dry, IMAGENET | nothing_kept))),
    ]


def _second(dry: bool) -> list[Job]:
    return [
        *_MACHINE,
        _step("3B/2 beside the released way", 260, dry, B3, {"layout.checkpointing": "none"}, against=True),
        _step("XL/2, 256 images", 110, dry, XL2, steps=3),
        _step("XL/2, 16 images", 70, dry, XL2, {"batch.images": "16"}, steps=8),
        _step("B/2, 256 images", 80, dry, B2, steps=4),
    ]


def _third(dry: bool) -> list[Job]:
    peaks = [
        # One process each: what an engine leaves behind would count in the next one's peak.
        _step(f"XL/2, 64 images, {how}", 60, dry, XL2, {"batch.images": "64", "layout.checkpointing": how})
        for how in ("none", "selective", "full")
    ]
    long = IMAGENET | {"data.url": "preset:imagenet1024", "layout.checkpointing": "selective", "batch.images": "64"}
    return [
        *_MACHINE,
        *peaks,
        _step("3B/2, 64 images of 1,024 tokens", 120, dry, B3, long),
        _step("3B/2, 64 images", 70, dry, B3, {"batch.images": "64"}, steps=3),
        _step("3B/2, 16 images", 70, dry, B3, {"batch.images": "16"}, steps=8),
        _tests("tests of the peak", 90, "peak"),
    ]


def _fourth(dry: bool) -> list[Job]:
    return _MACHINE + [_step(f"3B/2, {name}", 110, dry, B3, keys, steps=2) for name, keys in LEVERS.items()]


_MACHINE = [Job("machine", 60, ("-m", "tests.gpu.machine"))]


def _step(
    name: str,
    seconds: float,
    dry: bool,
    config: str,
    keys: dict[str, str] | None = None,
    steps: int = 1,
    against: bool = False,
) -> Job:
    """One round: the first steps of each shape come before it, and compile."""
    words = ("-m", "fitv2_scale.cli", "bench", "step", config, *_overrides(dry, IMAGENET | (keys or {})))
    words += ("--steps", str(steps), "--repeats", "1", "--json", *["--against", "reference"] * against)
    return Job(name, seconds, words)


def _overrides(dry: bool, keys: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in (keys | (_SMALL if dry else {})).items()]


def _tests(name: str, seconds: float, which: str) -> Job:
    return Job(
        name, seconds, ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", "-k", which), is_pytest=True
    )
