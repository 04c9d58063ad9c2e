"""`fitv2 bench step --sweep`: which of the keys that only a GPU can decide make a step faster here.

Each round measures the config as given, then with each key alone; what is compared are ratios in one round. The keys
that help are then measured together, in rounds of their own. A difference within the noise, by how far the ratios of a
config differ from round to round, counts for nothing. The report also names what was not tried.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from data_sharding.errors import UserError
from fitv2_scale.bench.spread import spread
from fitv2_scale.bench.step_rounds import Case, free, our_round
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.agreement import agree, read_alike
from fitv2_scale.parallel.gpu_kernels import require_kernels, training_kernels
from fitv2_scale.parallel.rank_facts import config_facts, read_data, software_facts
from fitv2_scale.parallel.world import World, join
from fitv2_scale.planning.forecast.words import counted

GIVEN = "as given"
# Keys of ``layout`` that compute the same in another way, and their values. Precisions are none: they change losses.
KEYS: dict[str, tuple[Any, ...]] = {
    "reshard_after_forward": ("always", "never"),
    "prefetch_blocks": (1, 2, 4),
    "gate_and_value": ("separate", "merged"),
    "kernels": ("compiled", "triton"),
    "attention": ("auto", "flash4"),
    "pad_to_multiple_of": (8, 128),
}
_LEFT_TO_YOU = {"layout.precision": "changes losses", "layout.checkpointing": "trades time for memory"}
_NOTICEABLE = 0.995  # a ratio above is no gain


@dataclass(frozen=True)
class Measured:
    """A config beside the given one, by round: seconds a step of the slowest rank (infinite if its memory was too
    small), those of the given one, and the highest peak."""

    seconds: list[float]
    given_seconds: list[float]
    peak_bytes: int | None  # on CUDA

    @property
    def ratios(self) -> list[float]:
        return [mine / given for mine, given in zip(self.seconds, self.given_seconds, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def is_noise(self) -> bool:
        """Whether the round whose ratio is nearest to 1 is half way there from the median, or further: so the noise of
        a round that something else slowed down hides no difference. One round shows no noise."""
        nearest = max(self.ratios) if self.ratio < 1 else min(self.ratios)
        return len(self.ratios) > 1 and abs(self.ratio - 1) <= 2 * abs(self.ratio - nearest)

    @property
    def is_faster(self) -> bool:
        return self.ratio < _NOTICEABLE and not self.is_noise


def measure(config: Config, steps: int, repeats: int) -> dict[str, Any] | None:
    """All figures, on rank 0; None elsewhere. ``repeats`` rounds of ``steps`` steps of each config."""
    with join() as world:
        agree(world, config_facts(config) | software_facts(world.device) | {"steps": steps, "repeats": repeats})
        tried, refused = variants(config, world.device)
        found = _measured(world, {GIVEN: config} | tried, steps, repeats)
        helpful = _helpful(found)
        if len(helpful) > 1:
            together = {" ".join(helpful): changed(config, helpful)}
            found |= _measured(world, {GIVEN: config} | together, steps, repeats, kept=together)
        return _report(world, found, refused, steps, repeats) if world.is_first else None


def variants(config: Config, device: torch.device) -> tuple[dict[str, Config], dict[str, str]]:
    """With one key changed to each of its other values, by "layout.key=value"; and why some of these cannot be tried,
    with this config or on ``device``."""
    names = [f"layout.{k}={v}" for k, values in KEYS.items() for v in values if v != getattr(config.layout, k)]
    made = {name: changed(config, [name]) for name in names}
    reasons = {name: _why_refused(one, device) for name, one in made.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return {name: one for name, one in made.items() if name not in refused}, refused


def _why_refused(config: Config, device: torch.device) -> str | None:
    try:
        Config.model_validate(config.model_dump())
        require_kernels(config.layout, device)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    except UserError as error:
        return str(error)
    return None


def _helpful(found: Mapping[str, Measured]) -> list[str]:
    """Of each key the value with which a step is fastest, if that is noticeably faster."""
    best: dict[str, str] = {}
    for name in sorted(found, key=lambda name: found[name].ratio):
        if found[name].is_faster:
            best.setdefault(name.partition("=")[0], name)
    return [name for name in found if name in best.values()]


def changed(config: Config, names: Sequence[str]) -> Config:
    values = {}
    for name in names:
        key, _, text = name.removeprefix("layout.").partition("=")
        values[key] = next(value for value in KEYS[key] if str(value) == text)
    return config.model_copy(update={"layout": config.layout.model_copy(update=values)})


def _measured(
    world: World, configs: Mapping[str, Config], steps: int, repeats: int, kept: Mapping[str, Config] | None = None
) -> dict[str, Measured]:
    """Of each of ``configs``, or of those ``kept``. All ranks get the same numbers, and so decide alike."""
    cases = {}
    for name, config in configs.items():
        layout, data = read_alike(world, lambda config=config: read_data(config, world))
        cases[name] = Case(config, world, layout, data, steps)
    rounds = [{name: _round(case) for name, case in cases.items()} for _ in range(repeats)]
    found = {}
    for name in kept or configs:
        seconds = [taken[name][0] for taken in rounds]
        given = [taken[GIVEN][0] for taken in rounds]
        peaks = [peak for _, peak in (taken[name] for taken in rounds) if peak is not None]
        found[name] = Measured(seconds, given, max(peaks, default=None))
    return found


def _round(case: Case) -> tuple[float, int | None]:
    """Seconds a step of the slowest rank, and the highest peak."""
    with case.open() as stream:
        batches = list(stream)
    try:
        with training_kernels(case.config, case.world.device):
            mine = our_round(case, batches)[1]
        seconds, peak = mine.seconds_a_step, mine.peak_bytes
    except torch.OutOfMemoryError:
        seconds, peak = float("inf"), None
    free(case.world.device)
    told = case.world.all_gather((seconds, peak))
    return max(one for one, _ in told), max((peak for _, peak in told if peak is not None), default=None)


def _report(
    world: World, found: Mapping[str, Measured], refused: Mapping[str, str], steps: int, repeats: int
) -> dict[str, Any]:
    fastest = min(found, key=lambda name: (not found[name].is_faster, found[name].ratio))
    rows = [
        {
            "config": name,
            "seconds_a_step": spread(one.seconds),
            "as_given_seconds": spread(one.given_seconds),
            "times_as_long": spread(one.ratios),
            "within_noise": one.is_noise,
            "peak_bytes": one.peak_bytes,
        }
        for name, one in found.items()
    ]
    on_cuda = world.device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(world.device) if on_cuda else "CPU",
        "torch": torch.__version__,
        "ranks": world.size,
        "steps": steps,
        "rounds": repeats,
        "configs": rows,
        "best": fastest.split() if found[fastest].is_faster else [],
        "not_tried": [{"config": name, "why": why} for name, why in {**_LEFT_TO_YOU, **refused}.items()],
    }


def to_text(report: dict[str, Any]) -> str:
    r = report
    rounds = f"{counted(r['rounds'], 'round')} of {counted(r['steps'], 'step')}"
    lines = [f"{rounds} on {r['ranks']} x {r['machine']}, torch {r['torch']}", *map(_row, r["configs"])]
    if r["rounds"] == 1:
        lines.append("noise    unknown after one round: take --repeats 3 or more")
    elif noise := [row["config"] for row in r["configs"] if row["within_noise"] and row["config"] != GIVEN]:
        lines.append(f"noise    as large as the difference from the config as given: {'; '.join(noise)}")
    if r["machine"] == "CPU":
        lines.append("CPU      these keys are for GPUs: what helps here says nothing of one")
    lines += [f"untried  {one['config']}: {one['why']}" for one in r["not_tried"]]
    best = " ".join(r["best"]) or "the config as given; no key makes a step half a percent faster, and more than noise"
    return "\n".join([*lines, f"best     {best}"])


def _row(row: dict[str, Any]) -> str:
    """The ratios, and the seconds that they are of: both from the same rounds."""
    times, peak = row["times_as_long"], row["peak_bytes"]
    memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
    seconds = _range(row["seconds_a_step"], ".4g")
    if row["config"] == GIVEN:
        return f"{GIVEN}: {seconds} s{memory}"
    if math.isinf(times["median"]):
        return f"too little memory: {row['config']}"
    given = row["as_given_seconds"]["median"]
    return f"{_range(times, '.3f')} times as long, {seconds} s for {given:.4g} s as given{memory}: {row['config']}"


def _range(values: dict[str, float], digits: str) -> str:
    return f"{values['median']:{digits}} ({values['lowest']:{digits}} to {values['highest']:{digits}})"
