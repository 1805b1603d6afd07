"""A file of weights: ``source: {checkpoint: PATH, architecture: "zoo:resnet20"}``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from deploycnn import registry
from deploycnn.core import MAIN_FILE, Context, Draft, Format, Json, Source
from deploycnn.errors import SourceError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

_SIDE_FILES = ("architecture.json", "manifest.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Source):
    """A checkpoint of a named architecture, or a torch artifact of an earlier run (which knows its own)."""

    main: ClassVar[str] = "path"
    produces: ClassVar[Format] = "torch"

    path: Annotated[Path, "Weights (.safetensors, .pt, .pth, .th), or a torch artifact's folder."]
    architecture: Annotated[
        str | None,
        '"zoo:NAME", "torchvision:NAME", "timm:NAME" or "package.module:function"; null: a torch artifact.',
    ] = None
    new_head: Annotated[bool, "Start the classifier anew where the checkpoint has other classes."] = False
    num_classes: Annotated[int | None, Ge(1), "Classes; null: the data's, or the architecture's."] = None
    input_size: Annotated[
        tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None,
        "Image height and width; null: the data's, or the architecture's own without data.",
    ] = None

    def extra_identity(self) -> Json:
        """What the named architecture depends on, or the files beside the weights that describe it."""
        if self.architecture is not None:
            return self._inner(self.architecture).extra_identity()
        texts = [folder.read_bytes() for name in _SIDE_FILES if (folder := self._folder() / name).is_file()]
        return hashlib.sha256(b"\0".join(texts)).hexdigest()

    def run(self, ctx: Context) -> Draft:
        """Build the architecture, load the weights and write the model."""
        if self.architecture is not None:
            return self._inner(self.architecture).run(ctx)
        return self._run_artifact(ctx)

    def _inner(self, architecture: str) -> Source:
        """The source of the architecture, told to load this checkpoint."""
        kind, separator, name = architecture.partition(":")
        known = ("zoo", "torchvision", "timm")
        if not separator or not name:
            raise SourceError(
                f'checkpoint: architecture "{architecture}" should be KIND:NAME with KIND one of '
                f'{", ".join(known)}, or "package.module:function"; {nearest(kind, known)}'
            )
        if kind not in known:
            kind, name = "entrypoint", architecture
        cls: Any = registry.get("source", kind)
        inner: Source = cls(
            **{cls.main: name},
            weights=self.path,
            new_head=self.new_head,
            num_classes=self.num_classes,
            input_size=self.input_size,
        )
        return inner

    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def _run_artifact(self, ctx: Context) -> Draft:
        from deploycnn.errors import ArtifactError
        from deploycnn.models import artifact, drafting

        where = f"checkpoint: {self.path}"
        folder = self._folder()
        is_artifact = self.path.is_dir() or self.path.name == MAIN_FILE["torch"]
        if not is_artifact or not (folder / artifact.ARCHITECTURE_FILE).is_file():
            raise SourceError(
                f'{where}: is no torch artifact; name its architecture, such as architecture: "zoo:resnet20"'
            )
        try:
            model = artifact.load_model(folder)
        except ArtifactError as error:
            raise SourceError(f"checkpoint: {error}") from error
        drafting.settle_num_classes(ctx, self.num_classes, None, where)
        manifest = self._manifest(folder)
        facts = manifest.get("facts", {})
        if ctx.data is not None and facts.get("preprocessing") is not None:
            ctx.data.preprocessing.check_same(facts["preprocessing"], where)
        described = artifact.get_architecture(model)
        if manifest.get("inputs"):
            _, channels, *own_size = manifest["inputs"][0]["shape"]
        elif ctx.data is not None or self.input_size is not None:
            channels, own_size = described["options"].get("in_channels", 3), []
        else:
            raise SourceError(f"{where}: no manifest.json beside it tells the image size; give input_size")
        shape = drafting.settle_input_shape(ctx, self.input_size, own_size, channels, where)
        draft = drafting.torch_draft(ctx, model, described, shape, where=where)
        if ctx.data is not None:
            return draft
        known = dataclasses.replace(
            draft.facts, preprocessing=facts.get("preprocessing"), classes=tuple(facts.get("classes", ()))
        )
        return dataclasses.replace(draft, facts=known)

    def _manifest(self, folder: Path) -> Mapping[str, Any]:
        """What a run's store wrote beside the weights; empty where they were copied alone."""
        path = folder / "manifest.json"
        if not path.is_file():
            return {}
        try:
            manifest: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SourceError(f"{path}: damaged ({error}); delete it or copy the artifact again") from error
        return manifest
