"""Reads a run's configuration: YAML and ``key=value`` overrides, checked, with one sentence for what is wrong."""

import copy
import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from data_sharding.errors import UserError
from fitv2_scale.config.schema import Config
from fitv2_scale.config.section import Section
from fitv2_scale.config.slurm import SlurmConfig
from fitv2_scale.config.yaml_text import key_type, parse_mapping, parse_value, read_text

S = TypeVar("S", bound=Section)

_LONGEST_SHOWN = 120  # characters of a wrong value
# What to give instead, by pydantic's name of the error.
_INSTEAD = {
    "int_parsing": "give a whole number, as in 1000 or 1e3",
    "int_from_float": "give a whole number, as in 1000 or 1e3",
    "float_parsing": "give a number, as in 0.001 or 1e-3",
    "list_type": "give a list, as in [a, b]",
}


class _SlurmAlone(Section):
    slurm: SlurmConfig = SlurmConfig()


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies ``key.path=value`` overrides. Text is taken as it is written, whatever YAML would
    make of it; lists and sections are YAML. An override of a section changes the keys that it names, and no others.

    Raises:
        UserError: no such file, not YAML, a key given twice in the file or in the overrides, an unknown key (with the
            nearest right one) or a value of the wrong type.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml")))
        hint = f"; available: {known}" if known else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read the config {path!r}: {reason}{hint}") from error
    return parse_config(parse_mapping(text, path, Config), path, overrides)


def load_slurm(overrides: list[str]) -> SlurmConfig:
    """The section ``slurm`` alone, from ``slurm.key=value`` overrides. Raises UserError."""
    tree: dict = {}
    _override(tree, overrides, _SlurmAlone)
    try:
        return _SlurmAlone.model_validate(tree).slurm
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0])) from None


def parse_config(tree: dict, where: str, overrides: list[str] | None = None) -> Config:
    """Validates plain data, with overrides as for ``load_config``. Raises UserError with one sentence that names the
    key, and ``where`` unless an override is to blame."""
    tree = copy.deepcopy(tree)
    given = _override(tree, overrides or [], Config)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        blamed = "" if _was_overridden(first["loc"], given) else f"{where}: "
        raise UserError(f"{blamed}{_sentence(first)}") from None


def with_changes(section: S, changes: dict[str, Any]) -> S:
    """``section`` with other values, validated. Raises UserError with one sentence that names the key."""
    try:
        return section.model_validate(section.model_dump() | changes)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0], type(section))) from None


def explain(config: Config) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, what it means) of every key, in order."""
    yield from _explain(config, "")


def _explain(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _explain(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""


def overridden_keys(overrides: list[str]) -> set[str]:
    """The dotted keys that ``overrides`` set, those in sections one by one. Raises UserError if one is set twice."""
    return {".".join(path) for path in _override({}, overrides, Config)}


def _override(tree: dict, overrides: list[str], section: type[BaseModel]) -> dict[tuple[str, ...], str]:
    """Sets in ``tree`` what ``overrides`` give. Returns by which of them each key was set."""
    given: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        path = key.split(".")
        if not equals or not all(path):
            raise UserError(f"'{override}' is not of the form key=value, as in train.steps=1000")
        for leaf, each in _leaves(tuple(path), parse_value(value, key_type(section, path), override)):
            if leaf in given:
                raise UserError(
                    f"{'.'.join(leaf)} is given twice, by '{given[leaf]}' and by '{override}': keep one of them"
                )
            given[leaf] = override
            _set(tree, leaf, each)
    return given


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of ``value``, or of each key in it if it is a section."""
    if not isinstance(value, dict):
        yield path, value
        return
    for name, each in value.items():
        yield from _leaves((*path, name), each)


def _set(tree: dict, path: Sequence[str], value: Any) -> None:
    *parents, leaf = path
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"'{'.'.join(path)}': {parent} is a value, not a section")
    tree[leaf] = value


def _was_overridden(path: Sequence[str | int], given: Iterable[tuple[str, ...]]) -> bool:
    """Whether one of the keys ``given`` by overrides is what lies at ``path``, or a part of it."""
    return any(all(a == b for a, b in zip(key, path, strict=False)) for key in given)


def _sentence(error: ErrorDetails, section: type[BaseModel] = Config) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        nearest = _nearest(path)
        return f"unknown key {key}" + (f", did you mean {nearest}?" if nearest else "")
    while path and key_type(section, path) is Any and not path[-1].isdecimal():
        path.pop()  # the kind of a union that was tried
    key = ".".join(path)
    if error["type"] == "missing":
        return f"{key} is missing: give it in the file or as {key}=…"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":  # pydantic names the class, which no user knows
        message = f"it is a section: give its keys, as in {key}.KEY=VALUE"
    if error["type"] in _INSTEAD:
        message = f"{message} ({_INSTEAD[error['type']]})"
    if not key or isinstance(error["input"], dict):
        return f"{key}: {message}" if key else message
    shown = repr(error["input"])
    cut = "…" if len(shown) > _LONGEST_SHOWN else ""
    return f"{key} = {shown[:_LONGEST_SHOWN]}{cut}: {message}"


def _nearest(path: list[str]) -> str | None:
    keys = _all_keys(Config, "")
    by_path = difflib.get_close_matches(".".join(path), keys, n=1, cutoff=0.6)
    by_name = [
        k for k in keys if k.split(".")[-1] in difflib.get_close_matches(path[-1], [k.split(".")[-1] for k in keys])
    ]
    return (by_path or by_name or [None])[0]


def _all_keys(section: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys
