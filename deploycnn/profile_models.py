"""``profile``: measure models that exist, side by side.

Files are brought into the store like any other artifact (a mini-recipe each), so that what is measured is what is
described, and a second call finds what the first one measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploycnn import api, conclusion, evidence, measure, profile_engines, schema, store
from deploycnn import recipe as recipes
from deploycnn.core import Artifact
from deploycnn.errors import ArtifactError, DeployCNNError, PreprocessingError, RecipeError
from deploycnn.events import Events, Silent
from deploycnn.execute import execute
from deploycnn.plan import plan
from deploycnn.recipe import Profile, Recipe
from deploycnn.store import Store

if TYPE_CHECKING:
    from deploycnn.data.base import Data

#: What a file's ending says that it holds.
CHECKPOINTS = (".pt", ".pth", ".th", ".safetensors")


def parse_threads(text: str) -> int | Literal["all"]:
    """A thread count from the command line.

    Raises:
        RecipeError: neither a number above 0 nor ``all``.
    """
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f'--threads {text}: should be a number above 0, or "all"')
    return int(text)


def profile(
    *models: Path | str,
    recipe: Recipe | Mapping[str, Any] | Path | str | None = None,
    data: Path | str | None = None,
    runtimes: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int | Literal["all"]] = (1, "all"),
    budget_s: float = 6.0,
    trust_engine: bool = False,
    out: Path | str | None = None,
    events: Events | None = None,
) -> api.Run:
    """Measure models side by side; the first is what the others are compared with.

    Args:
        models: ``.onnx`` files, checkpoints (with ``recipe``), engines, run directories (all their variants), and
            folders of artifacts and engine bundles.
        recipe: Architecture, data and preprocessing for checkpoints; data for accuracy.
        data: An image folder, or a zip of one, to measure accuracy on.
        runtimes: Runtime specs; onnxruntime on the CPU by default.
        batch_sizes: The first decides.
        threads: The first decides.
        budget_s: Seconds of timing for each model, runtime, batch size and thread count.
        trust_engine: Load engines that no manifest vouches for; an engine is executable code.
        out: The run directory; ``runs/profile-<time>`` by default.
        events: Told of progress.

    Returns:
        The run.

    Raises:
        DeployCNNError: a file cannot be used, or the first model could not be measured.
    """
    if not models:
        raise RecipeError("profile: name at least one model")
    events = events or Silent()
    loaded = api.load_recipe(recipe, data=data) if recipe is not None else None
    for model in models:
        _require_usable(Path(model), loaded, trust_engine=trust_engine)
    wanted = profile_engines.runtimes([Path(model) for model in models], runtimes, trust=trust_engine)
    specs = wanted or (loaded.runtimes if loaded else ("onnxruntime:cpu",))
    measure.require_reference(specs)
    asked = {"runtimes": specs, "batch_sizes": batch_sizes, "threads": threads, "budget_s": budget_s}
    settings = schema.build(Profile, schema.to_json(asked), "profile")
    folder = _folder(out)
    with Store.open(folder) as opened:
        found: list[evidence.Entry] = []
        for model in models:
            found += _Bringer(opened, loaded, specs, events, trust_engine).bring(Path(model))
        entries = _unique(found)
        images = _images(entries, loaded, data)
        subjects = [
            measure.Subject(name=entry.name, artifact=entry.artifact) for entry in entries if entry.artifact
        ]
        measured = measure.measure(subjects, specs, settings, opened, images, events)
        report = evidence.report(
            evidence.Inputs(
                name=folder.name,
                entries=entries,
                baseline=entries[0].name,
                measured=measured,
                profile=settings,
                budget=None,
                data=images,
            )
        )
        unmeasured = conclusion.problems_of_report(report)
        conclusion.write_report(opened, report)
    problems = [f"{spec}: {why}" for spec, why in measured.unavailable.items()]
    return api.Run(path=folder, report=report, problems=(*problems, *measured.problems(), *unmeasured))


def _require_usable(path: Path, recipe: Recipe | None, *, trust_engine: bool) -> None:
    """Check, before anything is written, that ``path`` is something that can be measured.

    Raises:
        ArtifactError: it is missing, another kind of folder, or an engine that nothing vouches for.
        RecipeError: it is a checkpoint and nothing says of which architecture.
    """
    if profile_engines.is_engine(path):
        profile_engines.require_loadable(path, trust=trust_engine)
        return
    if path.is_dir() and ((path / "run.json").exists() or (path / "manifest.json").exists()):
        return
    if not path.is_file():
        kind = "a folder, but no run directory" if path.is_dir() else "missing"
        raise ArtifactError(f"{path}: {kind}; name an .onnx file, a checkpoint or a run directory")
    if path.suffix in CHECKPOINTS and recipe is None and not (path.parent / "manifest.json").exists():
        raise RecipeError(f"{path}: a checkpoint holds weights only; name the architecture with --recipe")


def _folder(out: Path | str | None) -> Path:
    """The run directory: ``out``, or a new one.

    Raises:
        ArtifactError: it holds the run of a recipe.
    """
    if out is not None:
        folder = Path(out)
        if (folder / "recipe.yaml").exists():
            raise ArtifactError(
                f"{folder}: holds the run of a recipe, whose report stays; choose another --out"
            )
        return folder
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"profile-{stamp}"
    number = 2
    while folder.exists():
        folder = folder.with_name(f"profile-{stamp}-{number}")
        number += 1
    return folder


@dataclasses.dataclass(frozen=True)
class _Bringer:
    """Turn what the user named into entries."""

    store: Store
    recipe: Recipe | None
    runtimes: Sequence[str]
    events: Events
    trust_engine: bool

    def bring(self, path: Path) -> list[evidence.Entry]:
        if path.is_dir() and (path / "run.json").exists():
            return list(_of_run(path))
        if path.is_dir() and (path / "manifest.json").exists():
            return [_of_artifact(path, path.name)]
        if path.suffix in profile_engines.ENDINGS and (path.parent / "manifest.json").exists():
            return [_of_artifact(path.parent, path.parent.name)]
        if profile_engines.is_engine(path):
            return [profile_engines.bring(path, _name(path), trust=self.trust_engine)]
        if path.suffix in CHECKPOINTS and (path.parent / "manifest.json").exists():
            return [_of_artifact(path.parent, path.parent.name)]
        if path.suffix in CHECKPOINTS and self.recipe is not None:
            return self.checkpoint(path, self.recipe)
        return [
            self.make(
                {"source": {"onnx": str(path.absolute())}, "variants": {_name(path): []}}, None, _name(path)
            )
        ]

    def checkpoint(self, path: Path, recipe: Recipe) -> list[evidence.Entry]:
        """A checkpoint as the recipe's architecture: exported, and as it is where PyTorch is asked for."""
        name = _name(path)
        chains: dict[str, list[str]] = {name: ["export"]}
        if any(spec.partition(":")[0] == "pytorch" for spec in self.runtimes):
            chains[f"{name}-torch"] = []
        raw = {
            key: value
            for key, value in recipe.raw.items()
            if key in ("source", "data", "preprocessing", "seed")
        }
        raw |= {"variants": chains, "profile": {"runtimes": list(self.runtimes)}}
        changed = recipes.load_values(raw, weights=path)
        images = api.open_data(changed)
        return [self.make(recipes.only(changed, [chain]), images, chain) for chain in chains]

    def make(self, raw: Mapping[str, Any] | Recipe, data: Data | None, name: str) -> evidence.Entry:
        loaded = raw if isinstance(raw, Recipe) else recipes.parse(raw, base=Path.cwd())
        planned = plan(loaded, data_fingerprint=data.fingerprint if data else None, check=False)
        outcome = execute(loaded, planned, self.store, data, self.events)
        if outcome.bugs:
            raise outcome.bugs[0]
        if outcome.failures:
            raise DeployCNNError(next(iter(outcome.failures.values())))
        self.store.link_variants(planned)
        return dataclasses.replace(conclusion.entries(loaded, planned, outcome, self.store)[0], name=name)


def _of_run(folder: Path) -> Iterator[evidence.Entry]:
    """The variants of a run, as they are linked there."""
    store.check_schema(folder)
    links = sorted((folder / "variants").glob("*")) if (folder / "variants").is_dir() else []
    if not links:
        raise ArtifactError(f"{folder}: holds no finished variants; run `deploycnn compress` there first")
    order = _variant_order(folder)
    for link in sorted(links, key=lambda item: (order.get(item.name, len(order)), item.name)):
        yield _of_artifact(link.resolve(), f"{folder.name}/{link.name}" if len(links) > 1 else folder.name)


def _variant_order(folder: Path) -> dict[str, int]:
    """Variants in the order of the run's recipe, baseline first."""
    try:
        raw = schema.load_yaml(
            (folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml")
        )
        names = sorted(raw["variants"], key=lambda name: name != raw.get("baseline"))
    except (OSError, KeyError, TypeError):
        return {}
    return {name: index for index, name in enumerate(names)}


def _of_artifact(folder: Path, name: str) -> evidence.Entry:
    artifact = store.load_artifact(folder)
    manifests = _chain(folder, artifact)
    parities = [
        manifest["facts"]["record"]["parity"] for manifest in manifests if manifest["step"] == "export"
    ]
    return evidence.Entry(
        name=name,
        passes=tuple(manifest["step"] for manifest in manifests[1:]),
        artifact=artifact,
        parity=parities[-1] if parities else None,
        provenance=tuple(conclusion.provenance(manifest) for manifest in manifests),
    )


def _chain(folder: Path, artifact: Artifact) -> list[dict[str, Any]]:
    """Manifests from the source to this artifact, as far as they lie beside it."""
    known = {}
    for path in folder.parent.glob("*/manifest.json"):
        with contextlib.suppress(ArtifactError):  # A damaged neighbour is no part of this chain.
            manifest = store.read_manifest(path.parent)
            known[manifest["key"]] = manifest
    chain, key = [], artifact.key
    while key in known:
        chain.append(known[key])
        key = next(iter(known[key]["parents"]), "")
    return chain[::-1]


def _name(path: Path) -> str:
    """A variant's name from a file's."""
    kept = "".join(
        char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in path.stem
    )
    return kept.lstrip("._-") or "model"


def _unique(entries: Sequence[evidence.Entry]) -> list[evidence.Entry]:
    """Number entries that would have the same name."""
    result: list[evidence.Entry] = []
    for entry in entries:
        taken = {other.name for other in result}
        name, number = entry.name, 2
        while name in taken:
            name, number = f"{entry.name}-{number}", number + 1
        result.append(dataclasses.replace(entry, name=name))
    return result


def _images(entries: Sequence[evidence.Entry], recipe: Recipe | None, data: Path | str | None) -> Data | None:
    """Images for accuracy: prepared as the recipe says, or as the models themselves do.

    Raises:
        PreprocessingError: a model does not say how its images are prepared, and no recipe does.
    """
    if recipe is not None:
        return api.open_data(recipe)
    if data is None:
        return None
    from deploycnn.data import opening
    from deploycnn.data.imagefolder import ImageFolder

    declared = [entry.artifact.facts.preprocessing for entry in entries if entry.artifact]
    if None in declared:
        nameless = entries[declared.index(None)].name
        raise PreprocessingError(
            f"{nameless}: does not say how its images are prepared; give --recipe with data and `preprocessing`"
        )
    return opening.open_source(ImageFolder(root=Path(data).absolute()), declared[0])
