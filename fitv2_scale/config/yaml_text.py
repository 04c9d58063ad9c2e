"""YAML and ``key=value`` as a config means them: what a value is, its key's type says.

YAML 1.1 guesses: to it 0123 is 83, 12:30 is 750, on is true, 2024-01-01 is a date and 1e-4 is text. Here a key that
takes text gets the characters as they are written, and one that takes a number gets the number that they show. A key
that is given twice is an error, not the last of both.
"""

import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from data_sharding.errors import UserError

_MOST_BYTES = 1 << 20  # of a file; a config has a few thousand
_MOST_VALUES = 100_000  # aliases counted as often as they are used
_NULLS = ("", "~", "null", "Null", "NULL")
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}
_MERGE = "tag:yaml.org,2002:merge"


def read_text(path: str) -> str:
    """The text of a config file, UTF-8, or UTF-16 with its mark. Raises OSError, and UserError if it is no text, or a
    pipe with a name of its own, which may have no writer. Those of <(…) in a shell are open already."""
    if Path(path).is_fifo() and not path.startswith(("/dev/", "/proc/")):
        raise UserError(f"{path} is a pipe: give a file, or <(COMMAND)")
    with Path(path).open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise UserError(f"{path} is larger than {_MOST_BYTES >> 20} MiB, which no config is: give a YAML file")
    encoding = "utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}): give a YAML file, saved as UTF-8"
        ) from error


def parse_mapping(text: str, where: str, section: type[BaseModel]) -> dict[str, Any]:
    """The keys of ``section`` that a YAML document sets, as plain data to validate. ``where`` names it in errors.

    Raises UserError: not YAML, no mapping, or a key that is given twice.
    """
    value = _Document(where).parse(text, section)
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a mapping of keys to values")
    return value


def parse_value(text: str, annotation: Any, where: str) -> Any:
    """What ``key=text`` sets a key of type ``annotation`` to. Lists, sections and what is in quotes are YAML."""
    kinds = _kinds(annotation)
    collection = any(get_origin(kind) is list or _is_section(kind) for kind in kinds)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted or (collection and (str not in kinds or text.startswith("["))):
        return _Document(where).parse(text, annotation)
    return _scalar(text, kinds, where)


def key_type(section: type[BaseModel], path: list[str]) -> Any:
    """The annotation of the key at ``path`` below ``section``; Any if there is no such key."""
    annotation: Any = section
    for name in path:
        found = _section_of(annotation)
        if found is None or name not in found.model_fields:
            return Any
        annotation = found.model_fields[name].annotation
    return annotation


class _Document:
    """One YAML document."""

    def __init__(self, where: str):
        self._where = where
        self._sizes: dict[int, int] = {}  # by id of a node: values in it, 0 while they are counted

    def parse(self, text: str, annotation: Any) -> Any:
        try:
            node = yaml.compose(text, yaml.SafeLoader)
            if node is None:
                return None
            self._count(node)
            return self._value(node, annotation, "")
        except yaml.YAMLError as error:
            raise UserError(f"{self._where} is not YAML: {_problem(error)}") from error
        except RecursionError as error:
            raise UserError(f"{self._where} is nested too deeply for a config") from error

    def _count(self, node: yaml.Node) -> int:
        """Values below ``node``. Raises UserError if they are too many: aliases of aliases multiply."""
        if id(node) in self._sizes:
            size = self._sizes[id(node)]
            if not size:
                raise self._error(node, "an alias stands for a value that holds it: write the value out")
            return size
        self._sizes[id(node)] = 0
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        size = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(self._count, parts)))
        if size > _MOST_VALUES:
            raise self._error(node, f"more than {_MOST_VALUES} values, which no config has: use fewer aliases")
        self._sizes[id(node)] = size
        return size

    def _value(self, node: yaml.Node, annotation: Any, key: str) -> Any:
        kinds = _kinds(annotation)
        if isinstance(node, yaml.MappingNode):
            section = _section_of(annotation)
            prefix = f"{key}." if key else ""
            return {
                name: self._value(child, key_type(section, [name]) if section else Any, f"{prefix}{name}")
                for name, child in self._pairs(node, prefix).items()
            }
        if isinstance(node, yaml.SequenceNode):
            item = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), Any)
            return [self._value(child, item, f"{key}.{i}") for i, child in enumerate(node.value)]
        if node.tag not in _TAGS:
            raise self._error(node, f"{key} has the tag {node.tag}: give a plain value")
        is_null = isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULLS
        if is_null and _section_of(annotation):
            return {}  # all its keys are commented out
        if is_null and str in kinds:
            raise self._error(node, f"""{key} is null: give a text, or "" for none""")
        if is_null and key:
            return None
        return _scalar(node.value, kinds, f"{self._where}, line {_line(node)}: {key}" if key else self._where)

    def _pairs(self, node: yaml.Node, prefix: str) -> dict[str, yaml.Node]:
        """The values of a mapping by key; those merged in by << yield to its own. Raises UserError."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, "<< merges what is no mapping: give it an alias of a section")
        own: dict[str, yaml.Node] = {}
        merged: dict[str, yaml.Node] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key is a list or a mapping: give a name")
            name = key.value
            if name in lines:
                raise self._error(key, f"{prefix}{name} is given twice, first in line {lines[name]}: keep one of them")
            lines[name] = _line(key)
            if key.tag == _MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    merged = self._pairs(source, prefix) | merged
            elif "." in name:
                raise self._error(key, f"{prefix}{name} is written with a dot: indent the last name below the others")
            else:
                own[name] = value
        return merged | own

    def _error(self, node: yaml.Node, what: str) -> UserError:
        return UserError(f"{self._where}, line {_line(node)}: {what}")


def _scalar(text: str, kinds: list[Any], where: str) -> Any:
    if re.search("[\0\ud800-\udfff]", text):  # no file name or database takes them
        raise UserError(f"{where}: {text!r} holds characters that are no text: leave them out")
    if str in kinds or not {int, float} & {*kinds}:
        return None if NoneType in kinds and str not in kinds and text in _NULLS else text
    if NoneType in kinds and text in _NULLS:
        return None
    return _number(text.strip(), where, whole=float not in kinds)


def _number(text: str, where: str, whole: bool) -> int | float | str:
    """The number that ``text`` shows to people: 1000, 1_000, 0x3e8, 1e3, -.inf; ``text`` itself if it is none.

    Raises UserError for 010, which is 8 to some readers and 10 to others.
    """
    if re.match(r"[-+]?0[0-9_]", text):
        raise UserError(f"{where}: {text} begins with a zero, which some read as octal: leave it out")
    if not text.isascii():
        return text
    with suppress(ValueError):
        return int(text, 0)
    special = re.fullmatch(r"([-+]?)\.(inf|nan)", text.lower())
    try:
        value = Decimal("".join(special.groups()) if special else text)
    except InvalidOperation:
        return text
    if whole and value.is_finite() and abs(value.adjusted()) < 30 and value == value.to_integral_value():
        return int(value)
    return float(value)


def _kinds(annotation: Any) -> list[Any]:
    """The types that a value may have: those of a union one by one, without constraints; Literal as itself, but that of
    whole numbers as int."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    if origin is Literal:
        return [int if all(type(value) is int for value in get_args(annotation)) else Literal]
    return [annotation]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return next((kind for kind in _kinds(annotation) if _is_section(kind)), None)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + " ".join(str(getattr(error, "problem", None) or error).split())
