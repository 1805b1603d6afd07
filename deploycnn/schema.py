"""From YAML and JSON to frozen dataclasses, with errors a person can act on.

External input is validated once, here. Types are strict (``epochs: "5"`` is an error), unknown keys are errors that
name the nearest known key, and duplicate YAML keys are errors instead of silent overwrites.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from deploycnn.errors import RecipeError, nearest

T = TypeVar("T")

#: How pydantic calls an unknown key, in dataclasses and in typed dictionaries.
_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")

#: How pydantic calls plain types, and plain types with limits, where they are branches of a union.
_BRANCHES = tuple(
    f"{limited}{name}" for limited in ("", "constrained-") for name in ("int", "str", "float", "bool")
)

#: YAML 1.1 reads ``1e-3`` as a string; people mean a number.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)

#: YAML 1.1 reads ``2:4`` as 124; people mean the sparsity.
_INT = re.compile(r"^(?:[-+]?0b[0-1_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0[0-7_]*|[-+]?[1-9][0-9_]*)$")
_NUMBERS = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")


@functools.cache
def _loader() -> type[Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe YAML with numbers such as 1e-3, without numbers to base 60 (``2:4``) and without duplicate keys."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str) and key in seen:
                    line = key_node.start_mark.line + 1
                    raise RecipeError(f'line {line}: key "{key}" is written twice; remove one')
                seen.add(key if isinstance(key, str) else None)
            return super().construct_mapping(node, deep=deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in _NUMBERS]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(_NUMBERS[0], _FLOAT, list("-+0123456789."))
    Loader.add_implicit_resolver(_NUMBERS[1], _INT, list("-+0123456789"))
    return Loader


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Raises:
        RecipeError: it is not YAML or holds a key twice; names ``where`` and the line.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())  # noqa: S506 - derives from SafeLoader
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise RecipeError(f"{where}: line {line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _nested(annotation: Any) -> Iterator[type]:
    """All dataclasses that appear in an annotation."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _nested(argument)


@functools.cache
def _adapter(cls: Hashable) -> Any:
    from pydantic import TypeAdapter

    pending: list[Any] = [cls]
    seen = set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        current.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}
        hints = typing.get_type_hints(current, include_extras=True)
        for name in field_names(current):
            pending.extend(_nested(hints[name]))
    return TypeAdapter(cast("type[Any]", cls))


def field_names(cls: type[Any]) -> tuple[str, ...]:
    """Names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(cls))


def _class_at(cls: type[Any], location: tuple[Any, ...]) -> type[Any] | None:
    """The dataclass that holds the last key of ``location``."""
    current = cls
    for part in location[:-1]:
        hints = typing.get_type_hints(current, include_extras=True)
        if part in hints:
            inner = list(_nested(hints[part]))
            if inner:
                current = inner[0]
    return current


def build(cls: type[T], options: object, where: str) -> T:
    """Make a ``cls`` from plain JSON-like ``options``.

    Raises:
        RecipeError: a key is unknown or a value does not fit; names ``where``, the key, the value and the mend.
    """
    from pydantic import ValidationError

    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        known = ", ".join(field_names(cls)) or "none"
        raise RecipeError(f"{where}: expected a mapping of options ({known}), got {options!r}")
    try:
        text = json.dumps(dict(options), default=_refuse)
    except ValueError as error:  # A YAML anchor that holds an alias of itself.
        raise RecipeError(f"{where}: refers to itself (*alias inside its own &anchor)") from error
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from error
    try:
        result: T = _adapter(cast("Hashable", cls)).validate_json(text, strict=True)
    except ValidationError as error:
        raise RecipeError(_explain(cls, error.errors(), where)) from None
    return result


def _refuse(value: object) -> None:
    """YAML makes dates and the like of some words."""
    raise TypeError(f"{value} is read as a {type(value).__name__}; put it in quotes if text is meant")


def _urgency(problem: Mapping[str, Any]) -> int:
    """A misspelt key also makes the right one "missing"; the misspelling is what to mend."""
    return 0 if problem["type"] in _UNKNOWN_KEY else 1


def _explain(cls: type[Any], problems: Sequence[Mapping[str, Any]], where: str) -> str:
    problem = min(problems, key=_urgency)
    location = _location(problem)
    readable = ".".join([where, *(str(part) for part in location)])
    if problem["type"] in _UNKNOWN_KEY:
        holder = _class_at(cls, tuple(problem["loc"])) or cls
        return f"{readable}: unknown key; {nearest(str(location[-1]), field_names(holder))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{readable}: required, but not given"
    # What takes one of several types tells what each of them expected.
    messages = dict.fromkeys(
        str(other["msg"]).removeprefix("Value error, ").replace("Input should", "should")
        for other in problems
        if _location(other) == location
    )
    first, *others = messages
    message = " or ".join([first, *(text.removeprefix("should be ") for text in others)])
    return f"{readable}: {message}, got {json.dumps(problem['input'], default=str)}"


def _location(problem: Mapping[str, Any]) -> tuple[Any, ...]:
    """Keys and indices that lead to a problem, without the branches of unions."""
    return tuple(part for part in problem["loc"] if not _is_branch(part))


def _is_branch(part: object) -> bool:
    """Whether a location part names a branch of a union (pydantic's "function-after[...]", "tuple[...]")."""
    return isinstance(part, str) and ("[" in part or part in _BRANCHES)


def to_json(value: object) -> Any:
    """A dataclass, tuple, path, ... as plain JSON-like values; the inverse of :func:`build`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list | frozenset | set):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def resolve_paths(component: T, base: Path, where: str) -> T:
    """Replace relative ``Path`` fields by absolute ones (relative to ``base``) and check that they exist.

    Raises:
        RecipeError: a file or folder does not exist.
    """
    changes: dict[str, Path] = {}
    for field in dataclasses.fields(component):  # type: ignore[arg-type]
        value = getattr(component, field.name)
        if isinstance(value, Path):
            path = (base / value.expanduser()).absolute()
            if not path.exists():
                raise RecipeError(f"{where}.{field.name}: no such file or folder: {path}")
            changes[field.name] = path
    return dataclasses.replace(component, **changes) if changes else component  # type: ignore[type-var]


def describe(cls: type[Any]) -> list[tuple[str, str, str, str]]:
    """Rows (name, type, default, help) of a component's fields, for help texts."""
    rows = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        metadata = getattr(hint, "__metadata__", ())
        plain = typing.get_args(hint)[0] if metadata else hint
        text = next((item for item in metadata if isinstance(item, str)), "")
        if field.default is not dataclasses.MISSING:
            default = json.dumps(to_json(field.default))
        elif field.default_factory is not dataclasses.MISSING:
            default = json.dumps(to_json(field.default_factory()))
        else:
            default = "required"
        rows.append((field.name, _type_name(plain), default, text))
    return rows


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    if annotation is Path:
        return "file"
    if origin is tuple:
        return "list"
    return str(getattr(annotation, "__name__", annotation))
