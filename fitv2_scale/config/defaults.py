"""Settings that another version stored. A key that they lack had not been invented yet, and means its default."""

from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python


def with_defaults(section: type[BaseModel], stored: dict[str, Any]) -> dict[str, Any]:
    """``stored``, plain data of ``section``, with the default of each key that it lacks, at any depth.

    Keys without a default stay absent, and keys that ``section`` does not know stay as they are.
    """
    filled = dict(stored)
    for key, field in section.model_fields.items():
        if key in stored:
            filled[key] = _fill(field.annotation, stored[key])
        elif not field.is_required():
            filled[key] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif (inner := _section_of(field.annotation, {})) is not None:
            filled[key] = with_defaults(inner, {})
    return filled


def unknown_keys(section: type[BaseModel], stored: dict[str, Any]) -> list[str]:
    """The dotted keys in ``stored`` that ``section`` does not have."""
    found = []
    for key, value in stored.items():
        field = section.model_fields.get(key)
        if field is None:
            found.append(key)
        elif isinstance(value, dict) and (inner := _section_of(field.annotation, value)) is not None:
            found += [f"{key}.{name}" for name in unknown_keys(inner, value)]
    return found


def _fill(annotation: Any, value: Any) -> Any:
    if isinstance(value, dict) and (inner := _section_of(annotation, value)) is not None:
        return with_defaults(inner, value)
    for kind in _kinds(annotation):
        if isinstance(value, list) and get_origin(kind) in (list, tuple):
            return [_fill(get_args(kind)[0], item) for item in value]
        if isinstance(value, dict) and get_origin(kind) is dict:
            return {key: _fill(get_args(kind)[1], item) for key, item in value.items()}
    return value


def _section_of(annotation: Any, value: dict[str, Any]) -> type[BaseModel] | None:
    """The section that ``value`` is of; where the annotation has several, the first that takes it."""
    sections = [kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    for section in sections[:-1]:
        try:
            section.model_validate(value)
        except ValidationError:
            continue
        return section
    return sections[-1] if sections else None


def _kinds(annotation: Any) -> list[Any]:
    """The members of a union; of any other annotation, itself."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _kinds(member)]
    return [annotation]
