"""Loads a config dataclass from YAML; a mistake comes back as one sentence that names file and field.

Configs are standard dataclasses with `__pydantic_config__ = STRICT` (see `source.py`); pydantic checks them.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from persona.errors import RecipeError

T = TypeVar("T")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file's fields, unchecked. Raises `RecipeError` if it is missing, not YAML or not a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{where}: is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise RecipeError(f"{path}: must be a mapping of fields, not {type(data).__name__}")
    return data or {}


def load_config(cls: type[T], path: str | Path, changes: Sequence[str] = ()) -> T:
    """Reads a YAML file into the config dataclass `cls`. `changes` such as "encoder.width=128" override fields.

    Raises `RecipeError` if the file is missing, empty, not YAML or not a mapping, and for every field that
    `cls` would not take.
    """
    data = read_mapping(path)
    if not data:
        raise RecipeError(f"{path}: is empty; expected the fields of {cls.__name__}: {_names(cls)}")
    for change in changes:
        _change(data, change)
    return parse_config(cls, data, str(path))


def parse_config(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Checks a loaded mapping against the config dataclass `cls`; `where` names its origin in messages.

    Raises `RecipeError` naming each dotted field, what was wrong, and for an unknown key the nearest known one.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: must be a mapping of fields, not {type(data).__name__}")
    try:
        return TypeAdapter(cls).validate_python(dict(data))
    except ValidationError as error:
        problems = _problems(cls, error)
    raise RecipeError("\n".join(f"{where}: {problem}" for problem in problems))


def stated(config: Any) -> dict[str, Any]:
    """The fields of a config that differ from their defaults, as JSON data; a field added later does not change it."""
    return TypeAdapter(type(config)).dump_python(config, mode="json", exclude_defaults=True)


def _change(data: Any, change: str) -> None:
    """Sets the field that "a.b.c=value" names; the value is YAML."""
    name, equals, text = change.partition("=")
    *way, last = name.strip().split(".")
    if not equals or not last:
        raise RecipeError(f"{change!r} is no change of a field; write it like encoder.width=128")
    try:
        for key in way:
            data = data.setdefault(key, {})
        data[last] = yaml.load(text, Loader=_Loader)
    except (AttributeError, TypeError):
        raise RecipeError(f"{change!r}: {key if way else name} is not a mapping of fields") from None
    except yaml.YAMLError:
        raise RecipeError(f"{change!r}: {text!r} is not a value in YAML") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML in which only true and false are booleans, so that a join's key `on` stays a word."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _problems(cls: type, error: ValidationError) -> list[str]:
    """One sentence per wrong field."""
    found: dict[tuple, list[str]] = {}
    details = [(detail, *_locate(cls, detail["loc"])) for detail in error.errors()]
    refused = {field for detail, field, _ in details if detail["type"] == "value_error"}
    for detail, field, owner in details:
        # Where a union's member (`str | ColumnSpec`) took all fields and refused them, that member was meant.
        if field in refused and detail["type"] != "value_error":
            continue
        message = _sentence(detail, owner)
        if message not in found.setdefault(field, []):
            found[field].append(message)
    sentences = []
    for field, messages in found.items():
        # A union (`str | ColumnSpec`) complains once per member; the member that was meant complains deeper down.
        if any(len(other) > len(field) and other[: len(field)] == field for other in found):
            continue
        name = ".".join(str(part) for part in field)
        sentences.append(f"{name} {' or '.join(messages)}" if name else " or ".join(messages))
    return sentences


def _sentence(detail: Mapping[str, Any], owner: Any) -> str:
    kind, value = detail["type"], detail["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        if not is_dataclass(owner):
            return "is not a known key"
        near = difflib.get_close_matches(str(detail["loc"][-1]), [f.name for f in fields(owner)], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {_names(owner)}"
        return f"is not a known key; {hint}"
    if kind in ("missing", "missing_argument"):
        return "is missing"
    if kind in ("value_error", "assertion_error"):
        return str(detail["ctx"]["error"])
    if kind in ("dataclass_type", "dict_type"):
        return f"must be a mapping, not {_shown(value)}"
    message = detail["msg"].replace("Input should be", "must be", 1)
    return f"{message}, not {_shown(value)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _names(cls: type) -> str:
    return ", ".join(f.name for f in fields(cls))


def _locate(hint: Any, location: Sequence[str | int]) -> tuple[tuple, Any]:
    """pydantic's location without the names of union members, and the type that holds its last part."""
    path, owner = [], hint
    for part in location:
        if get_origin(hint) in (Union, types.UnionType):
            members = [member for member in get_args(hint) if member is not type(None)]
            chosen = [member for member in members if part in (getattr(member, "__name__", None), str(member))]
            hint = (chosen or members)[0]
            if chosen:
                continue
        path.append(part)
        owner = hint
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(part)
        elif get_origin(hint) in (list, tuple, dict):
            hint = get_args(hint)[-1]
        else:
            hint = None
    return tuple(path), owner
