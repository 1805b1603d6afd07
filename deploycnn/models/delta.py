"""How a model differs from the base it is rebuilt from: changed widths, shared and extra tensors; plain JSON.

Structured pruning changes sizes and the plain attributes that mirror them (``out_channels``, ``groups``,
``num_features``, ``normalized_shape``, a shortcut's padding, ...), never the modules themselves. So a pruned
model is its base architecture plus these differences; nothing has to be pickled. The one exception: a residual block
that was dropped leaves a :class:`Dropped` in its place, and is told by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn

from deploycnn.core import Json
from deploycnn.errors import ArtifactError


class Dropped(nn.Identity):
    """Stands where a residual block was dropped; another class, so that no other replacement passes for one."""


_PARTS = {"attributes", "shapes", "shared", "transient", "dropped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Differences of a model to its base.

    Attributes:
        attributes: Module name -> attribute -> value; only attributes that the base has, too.
        shapes: Parameter or buffer name -> shape, where it is not the base's.
        shared: Name -> the name under which the same parameter or buffer is stored.
        transient: Buffers that a state dict leaves out but whose values are not the base's.
        dropped: Names of modules in whose place a :class:`Dropped` stands.
    """

    attributes: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    transient: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """As plain JSON values; empty parts are left out."""
        parts = {
            "attributes": {name: dict(values) for name, values in self.attributes.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "shared": dict(self.shared),
            "transient": list(self.transient),
            "dropped": list(self.dropped),
        }
        return {name: part for name, part in parts.items() if part}

    @classmethod
    def from_json(cls, value: Json) -> Delta:
        """The inverse of :meth:`to_json`.

        Raises:
            ArtifactError: the value is no delta.
        """
        if not isinstance(value, dict) or value.keys() - _PARTS:
            raise ArtifactError(f"the delta should hold {', '.join(sorted(_PARTS))} only")
        try:
            return cls(
                attributes={name: dict(values) for name, values in value.get("attributes", {}).items()},
                shapes={
                    name: tuple(int(size) for size in shape)
                    for name, shape in value.get("shapes", {}).items()
                },
                shared=dict(value.get("shared", {})),
                transient=tuple(value.get("transient", ())),
                dropped=tuple(value.get("dropped", ())),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ArtifactError(f"the delta is damaged ({error})") from error


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by every name that they have, buffers outside the state dict included."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def persistent_names(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers that belong to the state dict.

    Raises:
        ArtifactError: the model keeps something else than tensors there.
    """
    state = model.state_dict()
    foreign = sorted(name for name, value in state.items() if not isinstance(value, Tensor))
    if foreign:
        raise ArtifactError(
            f"the model keeps extra state that is no tensor, which cannot be stored: {listing(foreign)}"
        )
    return set(state)


def plain_attributes(module: nn.Module) -> dict[str, Json]:
    """Public attributes that are numbers, strings, ``None`` or (nested) sequences of them."""
    found = {}
    for name, value in vars(module).items():
        if not name.startswith(("_", "deploycnn_")) and name != "training":
            # Pruners leave NumPy integers behind.
            plain = int(value) if isinstance(value, np.integer) else value
            if _is_plain(plain):
                found[name] = plain
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def difference(model: nn.Module, base: nn.Module) -> Delta:
    """What has to be changed in ``base`` to get ``model``, tensor values apart.

    Args:
        model: The model.
        base: Its architecture, freshly built; what ``model`` has dropped is dropped from it, too.

    Raises:
        ArtifactError: modules were added, removed or replaced, which a delta cannot tell.
    """
    dropped = _dropped(model, base)
    drop(base, dropped)
    _check_same_modules(model, base)
    _check_same_code(model, base)
    ours, theirs = tensors(model), tensors(base)
    added = sorted(ours.keys() ^ theirs.keys())
    if added:
        raise ArtifactError(
            f"parameters or buffers were added to or removed from the architecture: {listing(added)}"
        )
    attributes = {}
    base_modules = dict(base.named_modules())
    for name, module in model.named_modules():
        before = plain_attributes(base_modules[name])
        changed = {
            key: value
            for key, value in plain_attributes(module).items()
            if key in before and (value != before[key] or type(value) is not type(before[key]))
        }
        if changed:
            attributes[name] = changed
    persistent = persistent_names(model)
    return Delta(
        attributes=attributes,
        shapes={name: tuple(ours[name].shape) for name in ours if ours[name].shape != theirs[name].shape},
        shared=_shared(ours),
        transient=tuple(
            name for name in ours if name not in persistent and not _same(ours[name], theirs[name])
        ),
        dropped=dropped,
    )


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Put an identity in the place of modules, in place."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, Dropped())


def _dropped(model: nn.Module, base: nn.Module) -> tuple[str, ...]:
    theirs = dict(base.named_modules())
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, Dropped) and name in theirs
    )


def _check_same_modules(model: nn.Module, base: nn.Module) -> None:
    ours = {name: _kind(module) for name, module in model.named_modules()}
    theirs = {name: _kind(module) for name, module in base.named_modules()}
    changed = sorted(
        name or "(the model itself)"
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
    )
    if changed:
        raise ArtifactError(
            f"modules were added, removed or replaced, so the model cannot be stored as a change of its "
            f"architecture: {listing(changed)}"
        )


def _kind(module: nn.Module) -> type:
    """The module's class; every ``GraphModule`` has one of its own, so its base stands for it."""
    return fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)


def _check_same_code(model: nn.Module, base: nn.Module) -> None:
    """Modules that were imported from a graph must still be that graph."""
    theirs = dict(base.named_modules())
    for name, module in model.named_modules():
        before = theirs[name]
        if (
            isinstance(module, fx.GraphModule)
            and isinstance(before, fx.GraphModule)
            and module.code != before.code
        ):
            raise ArtifactError(
                f"{name or 'the model'} computes something else than its architecture, which cannot be stored "
                "as a change of it"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def _shared(found: Mapping[str, Tensor]) -> dict[str, str]:
    """Later names of the same tensor -> its first name."""
    first: dict[int, str] = {}
    shared = {}
    for name, tensor in found.items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            shared[name] = owner
    return shared


def apply(delta: Delta, base: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Turn ``base`` into the model that ``delta`` and ``stored`` describe, in place.

    Args:
        delta: The differences.
        base: The freshly built architecture.
        stored: Every tensor of the model, under the first of its names.

    Raises:
        ArtifactError: they do not fit; lists what is missing, unexpected or of another shape.
    """
    unknown = sorted(set(delta.dropped) - dict(base.named_modules()).keys())
    if unknown:
        raise ArtifactError(
            f"the delta drops modules that the architecture does not have: {listing(unknown)}"
        )
    drop(base, delta.dropped)
    _apply_attributes(delta, base)
    before = tensors(base)
    unknown = sorted((delta.shapes.keys() | delta.shared.keys() | set(delta.transient)) - before.keys())
    if unknown:
        raise ArtifactError(
            f"the delta changes tensors that the architecture does not have: {listing(unknown)}"
        )
    wanted = (persistent_names(base) | set(delta.transient)) - delta.shared.keys()
    _check_names(wanted, set(stored))
    wrong = [
        f"{name} is {list(stored[name].shape)}, not {list(expected)}"
        for name in sorted(wanted)
        if tuple(stored[name].shape) != (expected := delta.shapes.get(name, tuple(before[name].shape)))
    ]
    wrong += [
        f"{name} is {stored[name].dtype}, not {before[name].dtype}"
        for name in sorted(wanted)
        if stored[name].dtype != before[name].dtype
    ]
    if wrong:
        raise ArtifactError(
            f"tensors of another shape or type than the architecture and its delta say: {listing(wrong)}"
        )
    # Whole objects are put in place, not values copied: shapes may differ, and what is shared is re-tied.
    placed = {name: _like(stored[name], before[name]) for name in wanted}
    for name, owner in delta.shared.items():
        if owner not in placed:
            raise ArtifactError(f'the delta says that "{name}" shares "{owner}", which is not stored')
        placed[name] = placed[owner]
    for name, tensor in placed.items():
        owner, _, attribute = name.rpartition(".")
        setattr(base.get_submodule(owner), attribute, tensor)


def _like(value: Tensor, before: Tensor) -> Tensor:
    if isinstance(before, nn.Parameter):
        return nn.Parameter(value, requires_grad=before.requires_grad)
    return value


def _check_names(wanted: set[str], given: set[str]) -> None:
    problems = []
    if missing := sorted(wanted - given):
        problems.append(f"missing tensors: {listing(missing)}")
    if unexpected := sorted(given - wanted):
        problems.append(f"unexpected tensors: {listing(unexpected)}")
    if problems:
        raise ArtifactError("; ".join(problems))


def _apply_attributes(delta: Delta, base: nn.Module) -> None:
    modules = dict(base.named_modules())
    for name, values in delta.attributes.items():
        if name not in modules:
            raise ArtifactError(
                f'the delta changes the module "{name}", which the architecture does not have'
            )
        before = plain_attributes(modules[name])
        for key, value in values.items():
            if key not in before or not _is_plain(value):
                raise ArtifactError(
                    f'the delta changes "{name}.{key}", which is no plain attribute of the architecture'
                )
            setattr(modules[name], key, _as_before(value, before[key]))


def _as_before(value: Json, before: Json) -> Json:
    """JSON knows lists only: give back the tuple that the attribute was."""
    if isinstance(value, list):
        items = (
            before if isinstance(before, tuple | list) and len(before) == len(value) else [None] * len(value)
        )
        restored = [_as_before(item, old) for item, old in zip(value, items, strict=True)]
        return restored if isinstance(before, list) else tuple(restored)
    return value


def listing(items: list[str], limit: int = 20) -> str:
    """Up to ``limit`` items, then how many more."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
