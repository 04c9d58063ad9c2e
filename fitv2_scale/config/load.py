"""Reads a run's configuration: YAML and ``key=value`` overrides, checked, with one sentence for what is wrong."""

import copy
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from data_sharding.errors import UserError
from fitv2_scale.config.schema import Config
from fitv2_scale.config.section import Section
from fitv2_scale.config.slurm import SlurmConfig

S = TypeVar("S", bound=Section)


class _SlurmAlone(Section):
    slurm: SlurmConfig = SlurmConfig()


class _Loader(yaml.SafeLoader):
    """YAML in which 5:20 is text; to YAML 1.1 it is a number of base 60."""

    def construct_int_or_text(self, node: yaml.ScalarNode) -> int | str:
        return node.value if ":" in node.value else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int_or_text)


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies ``key.path=value`` overrides, whose values are YAML too.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest right one) or a value of the wrong type.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml")))
        hint = f"; available: {known}" if known else ""
        raise UserError(f"cannot read the config {path}: {error.strerror}{hint}") from error
    tree = _parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of keys to values")
    return parse_config(tree, path, overrides)


def load_slurm(overrides: list[str]) -> SlurmConfig:
    """The section ``slurm`` alone, from ``slurm.key=value`` overrides. Raises UserError."""
    tree: dict = {}
    _override(tree, overrides)
    try:
        return _SlurmAlone.model_validate(tree).slurm
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0])) from None


def parse_config(tree: dict, where: str, overrides: list[str] | None = None) -> Config:
    """Validates plain data, with overrides as for ``load_config``. Raises UserError with one sentence that names the
    key."""
    tree = copy.deepcopy(tree)
    _override(tree, overrides or [])
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error.errors()[0])}") from None


def with_changes(section: S, changes: dict[str, Any]) -> S:
    """``section`` with other values, validated. Raises UserError with one sentence that names the key."""
    try:
        return section.model_validate(section.model_dump() | changes)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0])) from None


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


def _override(tree: dict, overrides: list[str]) -> None:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not of the form key=value, as in train.steps=1000")
        _set(tree, key, _parse_yaml(value, override))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _set(tree: dict, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"'{dotted}': {parent} is a value, not a section")
    tree[leaf] = value


def _sentence(error: ErrorDetails) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        nearest = _nearest(path)
        return f"unknown key {key}" + (f", did you mean {nearest}?" if nearest else "")
    if error["type"] == "missing":
        return f"{key} is missing: give it in the file or as {key}=…"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key} = {error['input']!r}: {message}" if key else message


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
