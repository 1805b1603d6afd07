"""A recipe: the single source of truth of a run, as YAML.

See ``recipes/`` for examples and ``docs/recipes.md`` for every key. Relative paths are relative to the recipe's
folder; paths given with ``--set``, ``--data`` and ``--weights`` are relative to the working directory.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen

from deploycnn import components, schema, targets
from deploycnn import overrides as edits
from deploycnn.core import Pass, Source
from deploycnn.errors import RecipeError, nearest

if TYPE_CHECKING:
    from deploycnn.data.base import DataSource

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the winner may cost."""

    max_top1_drop: Annotated[
        float, Ge(0), Le(1), "Largest top-1 drop against the baseline, as a fraction."
    ] = 0.01


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is measured, and how long it may take."""

    runtimes: Annotated[tuple[str, ...], "Runtimes to measure on; empty: those of the target."] = ()
    batch_sizes: Annotated[
        tuple[Annotated[int, Ge(1)], ...], MinLen(1), "The first one decides the winner."
    ] = (1,)
    threads: Annotated[
        tuple[Annotated[int, Ge(1)] | Literal["all"], ...], MinLen(1), "CPU threads; the first decides."
    ] = (1, "all")
    budget_s: Annotated[
        float, Gt(0), Le(86_400), "Seconds of timing for each model, runtime, batch size and thread count."
    ] = 6.0
    rounds: Annotated[
        int, Ge(6), "How often sessions are opened anew, at most; more make intervals narrower."
    ] = 20
    accuracy: Annotated[bool, "Measure accuracy on val and test with every runtime."] = True
    memory: Annotated[bool, "Measure peak memory, each in a process of its own."] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A named chain of passes; each pass with its name."""

    name: str
    passes: tuple[tuple[str, Pass], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A validated recipe. ``raw`` is the same as plain values with absolute paths, so that it can be rerun."""

    name: str
    source: tuple[str, Source]
    data: tuple[str, DataSource] | None
    preprocessing: Mapping[str, Any] | None
    target: targets.Target
    variants: tuple[Variant, ...]
    baseline: str
    budget: Budget
    profile: Profile
    seed: int
    task: str = "classification"
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Runtime specs to measure on; the first is the reference."""
        return self.profile.runtimes or self.target.runtimes

    def variant(self, name: str) -> Variant:
        """The variant called ``name``."""
        return next(variant for variant in self.variants if variant.name == name)


KEYS = (
    "name",
    "task",
    "source",
    "data",
    "preprocessing",
    "target",
    "variants",
    "baseline",
    "budget",
    "profile",
    "seed",
)
REQUIRED = ("source", "variants")
#: The largest seed that every random generator in use takes (NumPy's and scikit-learn's take 32 bits).
MAX_SEED = 2**32 - 1


def load(
    path: Path | str,
    *,
    overrides: Sequence[str] = (),
    data: Path | str | None = None,
    weights: Path | str | None = None,
) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: The YAML file.
        overrides: ``key.path=value`` settings, applied in order; list items by index, values as YAML.
        data: An ImageFolder (folder or zip) used instead of the recipe's data.
        weights: A checkpoint used instead of the source's weights.

    Raises:
        RecipeError: it is missing or wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(
            f"{path}: no such recipe; `deploycnn recipes list` shows those that come with it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from error
    raw = schema.load_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping with the keys {', '.join(REQUIRED)}; got {type(raw).__name__}"
        )
    _edit(raw, overrides, data, weights)
    return parse(raw, base=path.absolute().parent, default_name=path.stem, where=str(path))


def load_values(
    values: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    data: Path | str | None = None,
    weights: Path | str | None = None,
) -> Recipe:
    """Like :func:`load`, for a recipe given as plain values; relative paths are taken from the working directory.

    Raises:
        RecipeError: it is wrong.
    """
    raw = copy.deepcopy(dict(values))
    _edit(raw, overrides, data, weights)
    return parse(raw, base=Path.cwd())


def _edit(
    raw: dict[str, Any], overrides: Sequence[str], data: Path | str | None, weights: Path | str | None
) -> None:
    components.require_weights_option(raw.get("source"), weights)
    edits.apply(raw, overrides, data=data, weights=weights)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every default written out, every path absolute, ready to be run again."""
    import yaml

    return yaml.safe_dump(dict(recipe.raw), sort_keys=False, allow_unicode=True, width=100)


def only(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The same recipe with just these variants and those that they refer to.

    Raises:
        RecipeError: a variant does not exist.
    """
    known = [variant.name for variant in recipe.variants]
    wanted: list[str] = []
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in known:
            raise RecipeError(f'no variant "{name}"; {nearest(name, known)}')
        if name not in wanted:
            wanted.append(name)
            pending += [other for _, step in recipe.variant(name).passes for other in step.references()]
    kept = tuple(variant for variant in recipe.variants if variant.name in wanted)
    baseline = recipe.baseline if recipe.baseline in wanted else kept[0].name
    return _with_raw(dataclasses.replace(recipe, variants=kept, baseline=baseline))


def parse(raw: Mapping[str, Any], *, base: Path, default_name: str = "run", where: str = "recipe") -> Recipe:
    """Validate a recipe given as plain values. Relative paths are taken from ``base``.

    Raises:
        RecipeError: a key or value is wrong, or a chain of passes does not fit.
    """
    for key in raw:
        if key not in KEYS:
            raise RecipeError(f"{where}: {key}: unknown key; {nearest(str(key), KEYS)}")
    for key in REQUIRED:
        if not raw.get(key):
            raise RecipeError(f"{where}: {key}: required, but not given")
    name = raw.get("name", default_name)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(f"{where}: name: should be letters, digits, '.', '_' or '-', got {name!r}")
    if raw.get("task", "classification") != "classification":
        raise RecipeError(f"{where}: task: should be classification, got {raw['task']!r}")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise RecipeError(f"{where}: seed: should be a whole number from 0 to {MAX_SEED}, got {seed!r}")
    source = components.source(raw["source"], base, where)
    data = components.data(raw.get("data"), base, where)
    variants = _variants(raw["variants"], base, where)
    names = [variant.name for variant in variants]
    baseline = raw.get("baseline", names[0])
    if baseline not in names:
        raise RecipeError(f'{where}: baseline: no variant "{baseline}"; {nearest(str(baseline), names)}')
    profile = schema.build(Profile, raw.get("profile"), f"{where}: profile")
    recipe = Recipe(
        name=name,
        source=source,
        data=data,
        preprocessing=components.preprocessing(raw.get("preprocessing"), where),
        target=components.target(raw.get("target", "onnxruntime-cpu"), where),
        variants=variants,
        baseline=baseline,
        budget=schema.build(Budget, raw.get("budget"), f"{where}: budget"),
        profile=profile,
        seed=seed,
    )
    _check_runtimes(recipe, where)
    return _with_raw(recipe)


def _variants(raw: object, base: Path, where: str) -> tuple[Variant, ...]:
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{where}: variants: expected a mapping NAME: [pass, ...], got {raw!r}")
    variants = []
    for name, chain in raw.items():
        place = f"{where}: variants.{name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RecipeError(f"{place}: a variant's name is letters, digits, '.', '_' or '-'")
        variants.append(Variant(name=name, passes=components.chain(chain, base, place)))
    return tuple(variants)


def _check_runtimes(recipe: Recipe, where: str) -> None:
    from deploycnn.runtimes.base import parse_spec

    for spec in recipe.profile.runtimes:
        try:
            parse_spec(spec)
        except RecipeError as error:
            raise RecipeError(f"{where}: profile.runtimes: {error}") from None


def _with_raw(recipe: Recipe) -> Recipe:
    """Fill in ``raw`` with every default written out."""
    kind, source = recipe.source
    options = schema.to_json(source)
    raw: dict[str, Any] = {
        "name": recipe.name,
        "task": recipe.task,
        "seed": recipe.seed,
        "source": {kind: options.pop(source.main), **options},
        "target": recipe.target.name,
        "baseline": recipe.baseline,
        "variants": {
            variant.name: [{name: schema.to_json(step)} for name, step in variant.passes]
            for variant in recipe.variants
        },
        "budget": schema.to_json(recipe.budget),
        "profile": schema.to_json(recipe.profile),
    }
    if recipe.data is not None:
        raw["data"] = {recipe.data[0]: schema.to_json(recipe.data[1])}
    if recipe.preprocessing is not None:
        raw["preprocessing"] = dict(recipe.preprocessing)
    return dataclasses.replace(recipe, raw=raw)
