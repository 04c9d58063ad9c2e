"""Removes secrets from what is written: configs, provenance, reasons and log lines pass through ``redact``."""

import re
from typing import Any

from fitv2_scale.run.paths import PATH_KEYS

HIDDEN = "[redacted]"

# Whole words, so that the settings of a model (`tokens`, `max_tokens`, `qk_norm`, `keyed`) stay readable.
_SECRET_WORDS = {"token", "secret", "secrets", "password", "passwd", "passphrase", "key", "apikey", "accesskey"} | {
    "credential",
    "credentials",
    "authorization",
    "signature",
    "sig",
}
_NUMBER_MAY_BE_SECRET = {"password", "passwd", "passphrase", "secret"}  # `key: 3` is a setting, `password: 1234` is not
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_USER_INFO = re.compile(r"(?<=://)[^/\s?#]+@")
# Not behind a slash: in /data/token=v1/set it is the name of a folder.
_ASSIGNMENT = re.compile(r"(?<![\w.\-/])([\w.\-]+)=([^\s&]+)")


def redact(value: Any) -> Any:
    """A copy of a JSON-like ``value`` (dicts, lists, tuples, scalars) with all that looks like a secret replaced.

    That is: the value under a key one of whose words is token, secret, password, key and the like; the user part of
    a URL (``https://me:pw@host`` becomes ``https://[redacted]@host``); ``name=value`` inside a string, and the item
    after ``--name`` in a list (a command line), when the name is such a word. Parts of a path are no secrets: neither
    ``/data/token=v1/set`` nor, under a key that takes a path, ``my token=v1``. What follows the ? of a URL is no path.

    >>> redact({"api_key": "s3cr3t", "max_tokens": 256, "uri": "https://me:pw@host/x"})
    {'api_key': '[redacted]', 'max_tokens': 256, 'uri': 'https://[redacted]@host/x'}
    """
    if isinstance(value, dict):
        return {k: HIDDEN if _is_secret(str(k), v) else _redact_under(k, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [
            HIDDEN if before.startswith("--") and isinstance(item, str) and _is_secret(before, item) else redact(item)
            for before, item in zip(["", *map(str, value)], value, strict=False)
        ]
    if isinstance(value, str):
        value = _USER_INFO.sub(HIDDEN + "@", value)
        return _ASSIGNMENT.sub(lambda m: f"{m[1]}={HIDDEN if _is_secret(m[1], m[2]) else redact(m[2])}", value)
    return value


def _redact_under(key: Any, value: Any) -> Any:
    if key not in PATH_KEYS or not isinstance(value, str | list) or not all(isinstance(v, str) for v in value):
        return redact(value)
    return [_redact_place(place) for place in value] if isinstance(value, list) else _redact_place(value)


def _redact_place(place: str) -> str:
    path, mark, query = place.partition("?") if "://" in place else (place, "", "")
    return _USER_INFO.sub(HIDDEN + "@", path) + mark + redact(query)


def _is_secret(name: str, value: Any) -> bool:
    words = set(re.split(r"[^a-z]+", _CAMEL_HUMP.sub("_", name).lower()))
    if value is None or isinstance(value, bool | dict):
        return False  # nothing to hide; a dict is looked into key by key
    if isinstance(value, int | float):
        return bool(words & _NUMBER_MAY_BE_SECRET)
    return bool(words & _SECRET_WORDS)
