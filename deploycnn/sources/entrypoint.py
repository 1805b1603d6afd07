"""The user's own model: ``source: {entrypoint: "package.module:function"}``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from deploycnn.core import Context, Draft, Format, Json, Source
from deploycnn.errors import SourceError, nearest

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Entrypoint(Source):
    """A function (or class) of the user's that returns a ``torch.nn.Module``.

    The module is imported from the working directory or the Python path. The function gets ``num_classes``
    and ``in_channels`` if it has parameters of these names. The same call must build the same architecture
    every time: artifacts hold weights and changed widths only.
    """

    main: ClassVar[str] = "function"
    produces: ClassVar[Format] = "torch"

    function: Annotated[str, 'Where the model comes from: "package.module:function".']
    weights: Annotated[Path | None, "Checkpoint to start from; null: as the function returns the model."] = (
        None
    )
    new_head: Annotated[bool, "Start the classifier anew where the checkpoint has other classes."] = False
    num_classes: Annotated[
        int | None, Ge(1), "Classes; null: the data's, or the function's without data."
    ] = None
    input_size: Annotated[
        tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None,
        "Image height and width; null: the data's, or 224x224 without data.",
    ] = None
    in_channels: Annotated[int, Ge(1), "Image channels where there are no data."] = 3

    def extra_identity(self) -> Json:
        """The code: the module's file, or all of its package's, so that an edit makes the model anew."""
        return code_fingerprint(self.function.partition(":")[0])

    @classmethod
    def build(cls, options: Mapping[str, Any], num_classes: int | None) -> nn.Module:
        """Call the user's function.

        Args:
            options: ``function``, and ``in_channels`` (3 where absent).
            num_classes: Handed on if given and the function takes it.

        Raises:
            SourceError: it cannot be imported, fails, or returns no ``torch.nn.Module``.
        """
        from torch import nn

        where = f"entrypoint: {options['function']}"
        function = _import(options["function"])
        offered = {"num_classes": num_classes, "in_channels": options.get("in_channels", 3)}
        taken = _parameters(function)
        arguments = {name: value for name, value in offered.items() if value is not None and name in taken}
        try:
            model: object = function(**arguments)
        except Exception as error:
            raise SourceError(f"{where}: fails: {_one_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise SourceError(f"{where}: returns {type(model).__name__}; it should return a torch.nn.Module")
        return model

    def run(self, ctx: Context) -> Draft:
        """Call the function, load weights and write the model."""
        from deploycnn.models import artifact, drafting, weights

        where = f"entrypoint: {self.function}"
        num_classes = drafting.settle_num_classes(ctx, self.num_classes, None, where)
        shape = drafting.settle_input_shape(ctx, self.input_size, (224, 224), self.in_channels, where)
        options = {"function": self.function, "in_channels": shape[0]}
        model = drafting.seeded(lambda: self.build(options, num_classes), ctx.seed)
        record = {}
        if self.weights is not None:
            record["weights"] = weights.load_weights(model, self.weights, new_head=self.new_head).to_json()
        described = artifact.architecture("entrypoint", options, num_classes)
        return drafting.torch_draft(ctx, model, described, shape, where=where, record=record)


def _import(path: str) -> Callable[..., object]:
    """The object called ``module:name``; the working directory is importable."""
    module_name, _, name = path.partition(":")
    if not name or not module_name:
        raise SourceError(f'entrypoint: "{path}" should be "package.module:function"')
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        # Stays there: the user's code may import more of its modules later.
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise SourceError(
                f"entrypoint: {path}: no module {error.name}; run in the folder that holds it, or install it"
            ) from error
        raise SourceError(f"entrypoint: {path}: importing it fails: {_one_line(error)}") from error
    except Exception as error:
        raise SourceError(f"entrypoint: {path}: importing it fails: {_one_line(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise SourceError(
            f'entrypoint: {path}: {module_name} has no function "{name}"; {nearest(name, known)}'
        )
    called: Callable[..., object] = found
    return called


def _parameters(function: Callable[..., object]) -> frozenset[str]:
    """Names that ``function`` takes as keywords."""
    from torch import nn

    if inspect.isclass(function) and function.__init__ is nn.Module.__init__:
        return frozenset()  # Its signature takes anything, its code nothing.
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return frozenset({"num_classes", "in_channels"})
    return frozenset(
        parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY
    )


def _one_line(error: Exception) -> str:
    """What went wrong in the user's code, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"


def code_fingerprint(module_name: str) -> str | None:
    """sha256 hex of a module's code, found without importing anything; ``None`` where there is none.

    A package counts as a whole, since its modules import one another; a lone module counts alone.
    """
    top = module_name.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, [str(Path.cwd()), *sys.path])
    if spec is None:
        return None
    if spec.submodule_search_locations:
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    else:
        files = [Path(spec.origin)] if spec.origin else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
