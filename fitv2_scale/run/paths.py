"""The keys of a config that hold paths, and how a run keeps them."""

import os
from collections.abc import Mapping
from typing import Any

PATH_KEYS = {
    "run",
    "url",
    "init_from",
    "cache_dir",
    "vae",
    "folder",
    "template",
}  # last names; values are paths or URLs
_SQLITE = "sqlite:///"


def absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the paths under PATH_KEYS, and that of an SQLite ``tracking.uri``, absolute: a run is read from
    other folders than the one in which it was started. URLs and presets stay."""
    return {key: _absolute_under(key, value) for key, value in config.items()}


def _absolute_under(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return absolute_paths(value)
    if key in PATH_KEYS:
        return [_absolute(each) for each in value] if isinstance(value, list) else _absolute(value)
    if key == "uri" and isinstance(value, str) and value.startswith(_SQLITE):
        file, mark, options = value.removeprefix(_SQLITE).partition("?")
        return f"{_SQLITE}{_absolute(file)}{mark}{options}"
    return value


def _absolute(path: Any) -> Any:
    if not isinstance(path, str) or not path or "://" in path or path.startswith("preset:"):
        return path
    return os.path.abspath(os.path.expanduser(path))
