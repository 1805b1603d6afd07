"""Parts of a recipe from plain values: its source, data, preprocessing, target and chains of passes.

``base`` is the folder that relative paths are taken from; ``where`` the place that errors name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycnn import registry, schema, targets
from deploycnn.core import Pass, Source
from deploycnn.errors import RecipeError, nearest

if TYPE_CHECKING:
    from deploycnn.data.base import DataSource


def source(raw: object, base: Path, where: str) -> tuple[str, Source]:
    """The kind of a source, and the source.

    Raises:
        RecipeError: no such kind, or an option is wrong.
    """
    known = registry.names("source")
    if isinstance(raw, str):
        raise RecipeError(
            f'{where}: source: write "source: {{KIND: {raw}}}" with KIND one of {", ".join(known)}'
        )
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{where}: source: expected a mapping such as {{zoo: resnet20}}, got {raw!r}")
    # The kind is the first key that names a source; a `checkpoint:` beside `zoo:` would be an option.
    kind = next((str(key) for key in raw if key in known), None)
    if kind is None:
        first = str(next(iter(raw), ""))
        raise RecipeError(f'{where}: source: unknown kind "{first}"; {nearest(first, known)}')
    cls: type[Source] = registry.get("source", kind)
    options = {cls.main if key == kind else key: value for key, value in raw.items()}
    place = f"{where}: source"
    return kind, schema.resolve_paths(schema.build(cls, options, place), base, place)


def data(raw: object, base: Path, where: str) -> tuple[str, DataSource] | None:
    """The kind of a data source, and the data source; ``None`` where the recipe has none.

    Raises:
        RecipeError: no such kind, or an option is wrong.
    """
    if raw is None:
        return None
    kind, options = _kind_and_options(raw, f"{where}: data", "digits")
    cls: type[DataSource] = _component("data", kind, f"{where}: data")
    place = f"{where}: data.{kind}"
    return kind, schema.resolve_paths(schema.build(cls, options, place), base, place)


def preprocessing(raw: object, where: str) -> Mapping[str, Any] | None:
    """Its plain values, once they are known to make a ``Preprocessing``.

    Raises:
        RecipeError: a key or value is wrong.
    """
    if raw is None:
        return None
    from deploycnn.data.preprocessing import Preprocessing

    schema.build(Preprocessing, raw, f"{where}: preprocessing")
    return dict(raw)  # type: ignore[call-overload,no-any-return]


def chain(raw: object, base: Path, where: str) -> tuple[tuple[str, Pass], ...]:
    """A variant's passes, each with its name.

    Raises:
        RecipeError: it is no list, or a pass or an option is wrong.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise RecipeError(f"{where}: expected a list of passes such as [export, int8], got {raw!r}")
    passes = []
    for index, item in enumerate(raw):
        kind, options = _kind_and_options(item, f"{where}.{index}", "export")
        cls: type[Pass] = _component("pass", kind, f"{where}.{index}")
        here = f"{where}.{index}.{kind}"
        if cls.main is not None and isinstance(options, str | int | float):
            options = {cls.main: options}
        passes.append((kind, schema.resolve_paths(schema.build(cls, options, here), base, here)))
    return tuple(passes)


def require_weights_option(source: object, weights: Path | str | None) -> None:
    """Refuse ``--weights`` where the source takes none, instead of naming a key that nobody wrote.

    Raises:
        RecipeError: it takes none; says its options.
    """
    if weights is None or not isinstance(source, Mapping):
        return
    kind = next((str(key) for key in source if key in registry.names("source")), None)
    if kind is None or kind == "checkpoint":
        return
    options = schema.field_names(registry.get("source", kind))
    if "weights" not in options:
        raise RecipeError(
            f"--weights {weights}: a source of kind {kind} takes no weights (its options: {', '.join(options)})"
            "; change the source instead"
        )


def target(raw: object, where: str) -> targets.Target:
    """The target called ``raw``.

    Raises:
        RecipeError: there is none.
    """
    if not isinstance(raw, str):
        raise RecipeError(f'{where}: target: expected a name such as "cpu", got {raw!r}')
    try:
        return targets.get(raw)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _component(kind: str, name: str, where: str) -> type[Any]:
    """The class called ``name``; a name that nobody has is told with its place."""
    try:
        return registry.get(kind, name)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _kind_and_options(raw: object, where: str, example: str) -> tuple[str, object]:
    """Read ``kind`` or ``{kind: {options}}``."""
    if isinstance(raw, str):
        return raw, {}
    if isinstance(raw, Mapping) and len(raw) == 1:
        kind, options = next(iter(raw.items()))
        return str(kind), options
    raise RecipeError(
        f'{where}: expected a name such as "{example}" or one {{name: {{options}}}}, got {raw!r}'
    )
