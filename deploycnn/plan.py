"""Recipe -> keyed steps. Pure: no torch, no files but the recipe's input files, whose contents enter the keys.

A step's key is the sha256 of everything that its output depends on, so equal prefixes of two variants are one
step, an unchanged step is a cache hit, and a changed one re-makes just what follows from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploycnn import schema
from deploycnn.core import Format, Pass, Source
from deploycnn.errors import PassRequirementError, RecipeError, nearest
from deploycnn.files import sha256_of
from deploycnn.recipe import Recipe

#: Enters every key: bump when the meaning of all artifacts changes.
KEY_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One artifact to make.

    Attributes:
        key: sha256 hex of all that the output depends on.
        name: Registry name of the source or pass.
        component: The configured source or pass.
        parent: Key of the artifact that it consumes; ``None`` for a source.
        references: Keys of other variants' artifacts that it needs, by variant name.
        variants: Variants that contain this step.
    """

    key: str
    name: str
    component: Source | Pass
    produces: Format
    parent: str | None
    references: Mapping[str, str]
    variants: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of the artifact's folder in the store."""
        return f"{self.name}-{self.key[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Steps in an order in which each comes after all that it needs."""

    steps: tuple[Step, ...]
    #: Variant name -> keys of its steps, source first.
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def step(self, key: str) -> Step:
        """The step with this key."""
        return next(step for step in self.steps if step.key == key)


def plan(
    recipe: Recipe, *, data_fingerprint: str | None, environment_fingerprint: str = "", check: bool = True
) -> Plan:
    """Check the chains and key every step.

    Args:
        recipe: What to do.
        data_fingerprint: Identity of images and preprocessing, ``None`` where the recipe has no data.
        environment_fingerprint: Identity of the machine; enters the keys of engines only.
        check: Whether :func:`check_chains` is asked first.

    Raises:
        RecipeError: formats do not fit, a reference does not exist or is circular, or data are missing.
    """
    if check:
        check_chains(recipe)
    return _Planner(recipe, data_fingerprint, environment_fingerprint).run()


def check_chains(recipe: Recipe) -> None:
    """Check what can be checked without data.

    Raises:
        RecipeError: a chain's formats or precisions do not fit, or a pass needs data and the recipe has none.
    """
    from deploycnn import registry
    from deploycnn.runtimes.base import parse_spec

    accepted = {spec: registry.get("runtime", parse_spec(spec)[0]).accepts for spec in recipe.runtimes}
    source_name, source = recipe.source
    for variant in recipe.variants:
        previous_name, format_ = source_name, source.produces
        # A file's precision is known once it is opened; until then any pass may follow it.
        precision = "fp32" if format_ == "torch" else None
        for index, (name, step) in enumerate(variant.passes):
            where = f"variants.{variant.name}.{index}.{name}"
            if step.consumes != format_:
                raise RecipeError(
                    f'{where}: needs a model in {step.consumes} format, but "{previous_name}" before it gives '
                    f"{format_}; {_mend(step.consumes, format_)}"
                )
            if precision is not None:
                try:
                    step.check_precision(precision)
                except PassRequirementError as error:
                    raise RecipeError(f"variants.{variant.name}.{index}: {error}") from error
            if step.needs_data and recipe.data is None:
                raise RecipeError(f"{where}: needs images, but the recipe has no `data`")
            previous_name, format_ = name, step.produces
            precision = step.precision_after(precision)
        if not any(format_ in formats for formats in accepted.values()):
            raise RecipeError(
                f"variants.{variant.name}: ends in {format_} format, which none of the runtimes "
                f"{', '.join(recipe.runtimes)} opens; {_mend('onnx', format_)}"
            )


def _mend(needed: str | None, given: str) -> str:
    if (given, needed) == ("torch", "onnx"):
        return "add `export` before it"
    if (given, needed) == ("onnx", "torch"):
        return "move it before `export`"
    return "check the order of the passes"


class _Planner:
    def __init__(self, recipe: Recipe, data_fingerprint: str | None, environment_fingerprint: str) -> None:
        self.recipe = recipe
        self.data = data_fingerprint
        self.environment = environment_fingerprint
        self.steps: dict[str, Step] = {}
        self.chains: dict[str, tuple[str, ...]] = {}
        self.open: list[str] = []

    def run(self) -> Plan:
        for variant in self.recipe.variants:
            self.chain(variant.name)
        ordered = {name: self.chains[name] for name in (variant.name for variant in self.recipe.variants)}
        return Plan(steps=tuple(self.steps.values()), chains=ordered)

    def chain(self, name: str) -> tuple[str, ...]:
        """Add the steps of a variant, and before them those of the variants that it refers to."""
        if name in self.chains:
            return self.chains[name]
        if name in self.open:
            circle = " -> ".join([*self.open[self.open.index(name) :], name])
            raise RecipeError(f"variants.{name}: variants refer to each other in a circle: {circle}")
        self.open.append(name)
        source_name, source = self.recipe.source
        keys = [self.add(source_name, source, None, {}, name)]
        for index, (pass_name, step) in enumerate(self.recipe.variant(name).passes):
            try:
                step.check_target(self.recipe.target.name)
            except PassRequirementError as error:
                raise RecipeError(f"variants.{name}.{index}: {error}") from error
            references = {
                other: self.last_torch(other, name, index, pass_name) for other in step.references()
            }
            keys.append(self.add(pass_name, step, keys[-1], references, name))
        self.open.pop()
        self.chains[name] = tuple(keys)
        return self.chains[name]

    def last_torch(self, other: str, name: str, index: int, pass_name: str) -> str:
        known = [variant.name for variant in self.recipe.variants]
        where = f"variants.{name}.{index}.{pass_name}"
        if other not in known:
            raise RecipeError(f'{where}: no variant "{other}"; {nearest(other, known)}')
        torch_keys = [key for key in self.chain(other) if self.steps[key].produces == "torch"]
        if not torch_keys:
            raise RecipeError(f'{where}: variant "{other}" holds no torch model that could serve here')
        return torch_keys[-1]

    def add(
        self,
        name: str,
        component: Source | Pass,
        parent: str | None,
        references: Mapping[str, str],
        variant: str,
    ) -> str:
        identity = {
            "key_version": KEY_VERSION,
            "name": name,
            "version": component.version,
            "fields": identity_of(component),
            "extra": component.extra_identity(),
            "parent": parent,
            "references": dict(references),
            "data": self.data,
            "seed": self.recipe.seed,
        }
        if isinstance(component, Pass):
            if component.uses_target or component.timing_decides:
                identity["target"] = self.recipe.target.name
            if component.uses_environment or component.timing_decides:
                identity["environment"] = self.environment
            if component.timing_decides:
                profile = self.recipe.profile
                identity["timed at"] = [list(profile.batch_sizes), list(profile.threads)]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        known = self.steps.get(key)
        variants = (*known.variants, variant) if known else (variant,)
        self.steps[key] = Step(
            key=key,
            name=name,
            component=component,
            produces=component.produces,
            parent=parent,
            references=references,
            variants=variants,
        )
        return key


def identity_of(component: object) -> dict[str, Any]:
    """Fields as plain values, with input files replaced by the hash of their content."""
    values = {}
    for item in dataclasses.fields(component):  # type: ignore[arg-type]
        value = getattr(component, item.name)
        values[item.name] = file_hash(value) if isinstance(value, Path) else schema.to_json(value)
    return values


def file_hash(path: Path) -> str:
    """sha256 hex of a file's content (of a folder's files: names and contents)."""
    if path.is_dir():
        digest = hashlib.sha256()
        for item in sorted(item for item in path.rglob("*") if item.is_file()):
            digest.update(f"{item.relative_to(path)}\0{file_hash(item)}\n".encode())
        return digest.hexdigest()
    stat = path.stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001 - part of the cache's key
    return sha256_of(path)
