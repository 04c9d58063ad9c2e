"""`fitv2 bench step --sweep`: which of the keys that only a GPU can decide make a step faster here.

Each round measures the config as given, then with each key alone; what is compared are ratios in one round. The keys
that help are then measured together.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_sharding.errors import UserError
from fitv2_scale.bench.spread import spread
from fitv2_scale.bench.step_rounds import Case, free, our_round
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.agreement import agree, read_alike
from fitv2_scale.parallel.gpu_kernels import require_kernels, training_kernels
from fitv2_scale.parallel.rank_facts import config_facts, read_data, software_facts
from fitv2_scale.parallel.world import World, join

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
_NOTICEABLE = 0.995  # a ratio above is no gain


@dataclass(frozen=True)
class Measured:
    """A config beside the given one, by round: seconds a step of the slowest rank (infinite if its memory was too
    small), the same over the given one's, and the highest peak."""

    seconds: list[float]
    ratios: list[float]
    peak_bytes: int | None  # on CUDA

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def measure(config: Config, steps: int, repeats: int) -> dict[str, Any] | None:
    """All figures, on rank 0; None elsewhere. ``repeats`` rounds of ``steps`` steps of each config."""
    with join() as world:
        agree(world, config_facts(config) | software_facts(world.device) | {"steps": steps, "repeats": repeats})
        found = _measured(world, {GIVEN: config} | variants(config, world.device), steps, repeats)
        helpful = _helpful(found)
        if len(helpful) > 1:
            together = {" ".join(helpful): changed(config, helpful)}
            found |= _measured(world, {GIVEN: config} | together, steps, repeats, kept=together)
        return _report(world, found, steps, repeats) if world.is_first else None


def variants(config: Config, device: torch.device) -> dict[str, Config]:
    """With one key changed to each of its other values, by "layout.key=value"; without what ``device`` lacks."""
    names = [f"layout.{k}={v}" for k, values in KEYS.items() for v in values if v != getattr(config.layout, k)]
    made = {name: changed(config, [name]) for name in names}
    return {name: one for name, one in made.items() if not _is_refused(one, device)}


def _is_refused(config: Config, device: torch.device) -> bool:
    try:
        Config.model_validate(config.model_dump())
        require_kernels(config.layout, device)
    except (UserError, ValueError):
        return True
    return False


def _helpful(found: Mapping[str, Measured]) -> list[str]:
    """Of each key the value with which a step is fastest, if that is noticeably faster."""
    best: dict[str, str] = {}
    for name in sorted(found, key=lambda name: found[name].ratio):
        if found[name].ratio < _NOTICEABLE:
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
        ratios = [taken[name][0] / taken[GIVEN][0] for taken in rounds]
        peaks = [peak for _, peak in (taken[name] for taken in rounds) if peak is not None]
        found[name] = Measured(seconds, ratios, max(peaks, default=None))
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


def _report(world: World, found: Mapping[str, Measured], steps: int, repeats: int) -> dict[str, Any]:
    fastest = min(found, key=lambda name: found[name].ratio)
    best = fastest if found[fastest].ratio < _NOTICEABLE else GIVEN
    rows = [
        {"config": name, "seconds_a_step": spread(one.seconds), "times_as_long": spread(one.ratios),
         "peak_bytes": one.peak_bytes}
        for name, one in found.items()
    ]  # fmt: skip
    machine = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    head = {"machine": machine, "torch": torch.__version__, "ranks": world.size, "steps": steps, "rounds": repeats}
    return head | {"configs": rows, "best": [] if best == GIVEN else best.split()}


def to_text(report: dict[str, Any]) -> str:
    r = report
    lines = [f"{r['rounds']} rounds of {r['steps']} steps on {r['ranks']} x {r['machine']}, torch {r['torch']}"]
    for row in r["configs"]:
        times, peak = row["times_as_long"], row["peak_bytes"]
        memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
        lines.append(
            f"{times['median']:.3f} times as long ({times['lowest']:.3f} to {times['highest']:.3f}), "
            f"{row['seconds_a_step']['median']:.4g} s{memory}: {row['config']}"
        )
    best = " ".join(r["best"]) or "the config as given; no key makes a step half a percent faster"
    return "\n".join([*lines, f"best     {best}"])
