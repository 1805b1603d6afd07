"""The verbs as functions; the command line parses, calls these and prints.

``compress`` makes and measures every variant of a recipe and names a winner; ``export`` stops at the artifacts and
writes deploy bundles; ``profile`` measures files and runs that exist. Each resumes what an earlier call left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycnn import bundle, conclusion, evidence, files, measure, retarget
from deploycnn import recipe as recipes
from deploycnn import recipes as shipped
from deploycnn.errors import DeployCNNError, RecipeError
from deploycnn.events import Events, Silent
from deploycnn.execute import Outcome, execute
from deploycnn.plan import Plan, check_chains, plan
from deploycnn.recipe import Recipe
from deploycnn.store import Store, check_schema

if TYPE_CHECKING:
    from deploycnn.data.base import Data

#: The recipe that runs where none is named.
DEFAULT_RECIPE = "quickstart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        path: The run directory.
        report: ``report.json`` as a dictionary.
        problems: What failed or could not be measured though the recipe asked for it, a line each.
    """

    path: Path
    report: Mapping[str, Any]
    problems: tuple[str, ...] = ()

    @property
    def winner(self) -> str | None:
        """Name of the fastest variant within the budget, or ``None``."""
        return self.report["winner"]["variant"] if self.report["winner"] else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A line of the plan: one step of one variant, and whether it is there already."""

    variant: str
    step: str
    key: str
    state: str


def load_recipe(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    overrides: Sequence[str] = (),
    data: Path | str | None = None,
    weights: Path | str | None = None,
) -> Recipe:
    """A recipe from a file, the name of a shipped one, plain values, or a recipe.

    Raises:
        RecipeError: it does not exist or is wrong.
    """
    if isinstance(recipe, Recipe):
        recipe = recipe.raw
    if isinstance(recipe, Mapping):
        return recipes.load_values(recipe, overrides=overrides, data=data, weights=weights)
    path = Path(recipe)
    if not path.exists() and path.name == str(recipe) and not path.suffix:
        path = shipped.find(str(recipe))
    return recipes.load(path, overrides=overrides, data=data, weights=weights)


def compress(
    recipe: Recipe | Mapping[str, Any] | Path | str = DEFAULT_RECIPE,
    *,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    data: Path | str | None = None,
    weights: Path | str | None = None,
    events: Events | None = None,
) -> Run:
    """Make every variant of a recipe, measure it here, and report.

    Args:
        recipe: A file, the name of a shipped recipe, plain values, or a :class:`Recipe`.
        out: The run directory; ``runs/<recipe's name>`` by default.
        overrides: ``key.path=value`` settings.
        data: An image folder, or a zip of one, used instead of the recipe's data.
        weights: A checkpoint used instead of the source's weights.
        events: Told of progress.

    Returns:
        The run; ``problems`` says what failed. The baseline always worked.

    Raises:
        DeployCNNError: the recipe is wrong, or its baseline could not be made or measured.
    """
    events = events or Silent()
    loaded = load_recipe(recipe, overrides=overrides, data=data, weights=weights)
    check_chains(loaded)
    measure.require_reference(
        loaded.runtimes,
        "; or make the variants without measuring (`deploycnn export`), or name another reference first in "
        "`profile: {runtimes: [...]}`",
    )
    opened = open_data(loaded)
    with Store.open(_folder(loaded, out)) as store:
        files.write_text(store.root / "recipe.yaml", recipes.dump(loaded))
        planned, outcome = _make(loaded, store, opened, events)
        subjects = conclusion.subjects(loaded, planned, outcome)
        measured = measure.measure(
            subjects, loaded.runtimes, loaded.profile, store, opened, events, seed=loaded.seed
        )
        report = evidence.report(
            evidence.Inputs(
                name=loaded.name,
                entries=conclusion.entries(loaded, planned, outcome, store),
                baseline=loaded.baseline,
                measured=measured,
                profile=loaded.profile,
                budget=loaded.budget,
                data=opened,
                recipe=recipes.dump(loaded),
            )
        )
        unmeasured = conclusion.problems_of_report(report)
        conclusion.write_report(store, report)
        conclusion.write_winner(store, report, subjects)
    conclusion.raise_bugs(outcome)
    problems = (*conclusion.problems_of_making(outcome, planned, measured, loaded), *unmeasured)
    return Run(path=store.root, report=report, problems=problems)


def export(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    variants: Sequence[str] = (),
    target: str | None = None,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    data: Path | str | None = None,
    weights: Path | str | None = None,
    events: Events | None = None,
) -> dict[str, Path]:
    """Make the variants of a recipe and write a deploy bundle of each, without measuring.

    Args:
        recipe: As for :func:`compress`.
        variants: Which ones; all by default.
        target: Used instead of the recipe's; for one with engines, ONNX variants get a `build_engine` at their end.
        out: The run directory; bundles go to its ``deploy/<variant>``.
        overrides: ``key.path=value`` settings.
        data: An image folder, or a zip of one, used instead of the recipe's data.
        weights: A checkpoint used instead of the source's weights.
        events: Told of progress.

    Returns:
        Variant name -> folder of its bundle.

    Raises:
        DeployCNNError: the recipe is wrong, there is no such variant, or one could not be made.
    """
    events = events or Silent()
    loaded = load_recipe(recipe, overrides=overrides, data=data, weights=weights)
    if target is not None:
        loaded = retarget.for_target(loaded, target)
    wanted = recipes.only(loaded, variants) if variants else loaded
    check_chains(wanted)
    bundles = {}
    opened = open_data(loaded)
    with Store.open(_folder(loaded, out)) as store:
        files.write_text(store.root / "recipe.yaml", recipes.dump(loaded))
        planned, outcome = _make(wanted, store, opened, events)
        conclusion.raise_bugs(outcome)
        wanted_names = tuple(variants or planned.chains)
        failed = [
            f"variant {name}: {outcome.failures[planned.chains[name][-1]]}"
            for name in wanted_names
            if planned.chains[name][-1] in outcome.failures
        ]
        if failed:
            raise DeployCNNError("; ".join(failed))
        for name in wanted_names:
            key = planned.chains[name][-1]
            artifact = outcome.artifacts[key]
            if artifact.format == "torch":
                raise RecipeError(
                    f"variants.{name}: ends in {artifact.format} format; add `export` to deploy it"
                )
            bundles[name] = store.root / "deploy" / name
            bundle.write_bundle(bundles[name], artifact, variant=name, runtime=None, evidence={})
    return bundles


def dry_run(
    recipe: Recipe | Mapping[str, Any] | Path | str = DEFAULT_RECIPE,
    *,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    data: Path | str | None = None,
    weights: Path | str | None = None,
) -> list[PlannedStep]:
    """What ``compress`` would do, step by step, without doing or writing anything.

    Raises:
        DeployCNNError: the recipe or its data are wrong.
    """
    from deploycnn import environment

    loaded = load_recipe(recipe, overrides=overrides, data=data, weights=weights)
    check_chains(loaded)
    folder = _folder(loaded, out)
    check_schema(folder)
    opened = open_data(loaded)
    planned = plan(
        loaded,
        data_fingerprint=opened.fingerprint if opened else None,
        environment_fingerprint=environment.detect().fingerprint,
    )
    store = Store(folder)
    return _rows(planned, lambda key: "hit" if store.has(planned.step(key)) else "miss")


def open_data(recipe: Recipe) -> Data | None:
    """The recipe's images with their preprocessing, or ``None`` where it names none.

    Raises:
        DataError: the images are missing or unusable.
        PreprocessingError: the preprocessing does not fit them.
    """
    if recipe.data is None:
        return None
    from deploycnn.data import opening

    return opening.open_source(recipe.data[1], recipe.preprocessing)


def _folder(recipe: Recipe, out: Path | str | None) -> Path:
    return Path(out) if out is not None else Path("runs") / recipe.name


def _make(recipe: Recipe, store: Store, opened: Data | None, events: Events) -> tuple[Plan, Outcome]:
    """Plan, and make all artifacts."""
    from deploycnn import environment

    here = environment.detect()
    planned = plan(
        recipe,
        data_fingerprint=opened.fingerprint if opened else None,
        environment_fingerprint=here.fingerprint,
    )
    files.write_json(store.root / "environments" / f"{here.fingerprint[:12]}.json", here.to_json())
    _write_plan(store, planned, lambda key: "hit" if store.has(planned.step(key)) else "miss")
    outcome = execute(recipe, planned, store, opened, events)
    _write_plan(store, planned, outcome.state)
    store.link_variants(planned)
    return planned, outcome


def _rows(planned: Plan, state: Any) -> list[PlannedStep]:
    return [
        PlannedStep(variant=name, step=planned.step(key).name, key=key, state=state(key))
        for name, keys in planned.chains.items()
        for key in keys
    ]


def _write_plan(store: Store, planned: Plan, state: Any) -> None:
    rows = _rows(planned, state)
    width = max(len(row.variant) for row in rows)
    lines = [f"{row.variant:<{width}}  {row.step:<12}  {row.key[:12]}  {row.state}" for row in rows]
    files.write_text(store.root / "plan.txt", "\n".join(lines) + "\n")


__all__ = [
    "PlannedStep", "Run", "compress", "dry_run", "export", "load_recipe", "open_data",
]  # fmt: skip
