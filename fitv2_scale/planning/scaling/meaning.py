"""What the loss of a run measures: losses that mean different things do not lie on one law.

That is the data, the objective, the held-out images and times of a validation loss, and whether training began with
random weights. Networks, learning rates, batches and seeds may differ from run to run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

from fitv2_scale.config.defaults import with_defaults
from fitv2_scale.config.schema import Config

Meaning = Mapping[str, str]
_VALIDATION = "validation"
_OF_OBJECTIVES = {
    "flow": ("flow.t_sampler", "flow.label_dropout"),
    "ddpm": ("ddpm.label_dropout", "model.outputs"),
}
OF_A_CONFIG = ("objective", *chain(*_OF_OBJECTIVES.values()), "data.views")  # what of a meaning a config decides
_SHOWN = 16  # characters of a value


@dataclass(frozen=True)
class Origin:
    """What a run's config does not say. ``datasets`` and ``validation`` are digests, None where they are not known;
    ``pretrained``: it began with the weights of another run; ``grid``: keys of its validation that have changed since.
    """

    datasets: Sequence[str] | None = None
    validation: Sequence[str] | None = None
    pretrained: bool = False
    grid: Mapping[str, int] = field(default_factory=dict)


def meaning_of(config: Mapping[str, Any], origin: Origin) -> Meaning:
    """Of a run's config, of any version."""
    whole = with_defaults(Config, dict(config))
    data, grid = whole["data"], whole["validation"] | origin.grid
    found: dict[str, Any] = {"objective": whole["objective"]}
    for section, _, key in (name.partition(".") for name in _OF_OBJECTIVES.get(whole["objective"], ())):
        found[f"{section}.{key}"] = whole[section][key]
    found |= {"data.views": data["views"], "begins with": "other weights" if origin.pretrained else "random weights"}
    if isinstance(data.get("url"), list):
        found["data.weights"] = data["weights"]
    found |= {f"{_VALIDATION}.{name}": grid[name] for name in ("images", "timesteps")}
    if origin.datasets:
        found["datasets"] = ",".join(origin.datasets)
    if origin.validation:
        found[f"{_VALIDATION} datasets"] = ",".join(origin.validation)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def unlike(a: Meaning, b: Meaning, metric: str) -> list[str]:
    """In what two runs differ, so that their ``metric`` measures different things, as "key: value and value"; so far
    as it is known of both."""
    return [
        f"{key}: {a[key]:.{_SHOWN}} and {b[key]:.{_SHOWN}}"
        for key in sorted(a.keys() & b.keys())
        if a[key] != b[key] and (metric.startswith("val_") or not key.startswith(_VALIDATION))
    ]


def first_difference(meanings: Mapping[str, Meaning], metric: str) -> str | None:
    """A sentence about two runs, by name, whose ``metric`` does not measure the same; None if there are none."""
    for (name, a), (other, b) in combinations(meanings.items(), 2):
        if differences := unlike(a, b, metric):
            return f"{name} and {other} do not measure the same {metric} ({'; '.join(differences)})"
    return None
