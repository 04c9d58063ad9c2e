"""Configs, recipes and starts compared, key by key."""

import hashlib
import json
from typing import Any

_SHOWN = 16  # digits of a digest, for people
# Keys of start.json on which results may depend. The layout is not among them: results do not depend on it.
_COMPARED = ("python", "packages", "cuda", "nccl", "driver", "git", "code", "gpus", "validation", "validation_grid")


def recipe_hash(recipe: dict[str, Any]) -> str:
    """sha256, in hex, of ``recipe`` as canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys; lists and empty dicts are leaves. {"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Each dotted key at which two configs differ, as "key: old -> new", sorted."""
    a, b = ({k: json.dumps(v, sort_keys=True) for k, v in flatten(tree).items()} for tree in (old, new))
    return [f"{k}: {a.get(k, '(absent)')} -> {b.get(k, '(absent)')}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def start_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between two start.json, of keys that both have."""
    compared = [key for key in _COMPARED if key in old and key in new]
    sides = [{key: side[key] for key in compared} for side in (old, new)]
    for side in sides:
        side["gpus"] = sorted({gpu["name"] for gpu in side.get("gpus", [])})  # their model, not which devices
        side["validation"] = [digest[:_SHOWN] for digest in side.get("validation", [])]
    return [line.replace('"', "") for line in differences(*sides)]
