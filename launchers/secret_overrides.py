"""Secret config overrides travel in a job's environment, since files and command lines can be read by other users."""

import json
from collections.abc import Mapping, Sequence

VARIABLE = "FITV2_PRIVATE"  # as JSON


def to_environment(overrides: Sequence[str]) -> dict[str, str]:
    """The variables that hold ``overrides``."""
    return {VARIABLE: json.dumps(list(overrides))}


def of_environment(environment: Mapping[str, str]) -> list[str]:
    """The secret overrides that the job was submitted with."""
    return json.loads(environment.get(VARIABLE, "[]"))
