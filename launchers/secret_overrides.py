"""Config overrides that are secret go along in a job's environment: files and command lines show them to others."""

import json
from collections.abc import Mapping, Sequence

_VARIABLE = "FITV2_PRIVATE"  # as JSON


def to_environment(overrides: Sequence[str]) -> dict[str, str]:
    return {_VARIABLE: json.dumps(list(overrides))}


def of_environment(environment: Mapping[str, str]) -> list[str]:
    """The overrides that the job was submitted with."""
    return json.loads(environment.get(_VARIABLE, "[]"))
