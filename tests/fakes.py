"""Components that cost nothing, so that recipes, plans and the walk are tested without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from annotated_types import Ge

from deploycnn import registry
from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Facts, Format, Pass, Source, TensorSpec
from deploycnn.errors import PassRequirementError
from deploycnn.runtimes.base import Availability, Runtime, Session


def write(ctx: Context, format_: Format, text: str) -> Draft:
    (ctx.output / MAIN_FILE[format_]).write_text(text)
    spec = TensorSpec(name="images", dtype="float32", shape=(None, 3, 8, 8))
    return Draft(format=format_, inputs=(spec,), outputs=(spec,), facts=Facts(params=1))


@dataclass(frozen=True, kw_only=True)
class Model(Source):
    """A model that is a line of text."""

    main: ClassVar[str] = "name"
    produces: ClassVar[Format] = "torch"

    name: str
    weights: Path | None = None

    def run(self, ctx: Context) -> Draft:
        return write(ctx, "torch", f"{self.name} seed {ctx.seed}")


@dataclass(frozen=True, kw_only=True)
class Tune(Pass):
    """Adds a line; may need a teacher."""

    main: ClassVar[str | None] = "amount"
    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "torch"

    amount: Annotated[int, Ge(0), "How much."] = 1
    teacher: str | None = None

    def references(self) -> tuple[str, ...]:
        return (self.teacher,) if self.teacher else ()

    def run(self, source: Artifact, ctx: Context) -> Draft:
        taught = "".join(artifact.path.read_text() for artifact in ctx.references.values())
        digest = hashlib.sha256(taught.encode()).hexdigest()[:6]
        return write(ctx, "torch", f"{source.path.read_text()}\ntuned {self.amount} {digest}")


@dataclass(frozen=True, kw_only=True)
class Export(Pass):
    """From torch to onnx, in words."""

    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "onnx"

    def run(self, source: Artifact, ctx: Context) -> Draft:
        return write(ctx, "onnx", source.path.read_text() + "\nexported")


@dataclass(frozen=True, kw_only=True)
class Fail(Pass):
    """Fails, in the user's way or in ours."""

    consumes: ClassVar[Format] = "onnx"
    produces: ClassVar[Format] = "onnx"

    ours: bool = False
    at_check: bool = False

    def requires(self, source: Artifact) -> None:
        if self.at_check:
            raise PassRequirementError("cannot be applied here")

    def run(self, source: Artifact, ctx: Context) -> Draft:
        (ctx.output / "half.bin").write_text("half")
        if self.ours:
            raise ZeroDivisionError("a bug")
        raise PassRequirementError("fail: does not fit")


@dataclass(frozen=True, kw_only=True)
class Target(Pass):
    """Depends on the target and the machine."""

    consumes: ClassVar[Format] = "onnx"
    produces: ClassVar[Format] = "engine"
    uses_target: ClassVar[bool] = True
    uses_environment: ClassVar[bool] = True

    def run(self, source: Artifact, ctx: Context) -> Draft:
        return write(ctx, "engine", source.path.read_text())


@dataclass(frozen=True, kw_only=True)
class Timed(Pass):
    """Decided by what is timed."""

    consumes: ClassVar[Format] = "onnx"
    produces: ClassVar[Format] = "onnx"
    timing_decides: ClassVar[bool] = True

    def run(self, source: Artifact, ctx: Context) -> Draft:
        return write(ctx, "onnx", source.path.read_text() + f"\n{ctx.stopwatch is not None}")


@dataclass(frozen=True, kw_only=True)
class Machine(Runtime):
    """Opens nothing."""

    modes: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "f32")
    accepts: ClassVar[tuple[Format, ...]] = ("onnx", "engine")

    mode: str

    def availability(self) -> Availability:
        return Availability(ok=True, version="1")

    def open(self, artifact: Artifact, *, batch_size: int, threads: int) -> Session:
        raise NotImplementedError


COMPONENTS: dict[str, dict[str, type[Any]]] = {
    "source": {"model": Model},
    "pass": {"tune": Tune, "export": Export, "fail": Fail, "engine": Target, "timed": Timed},
    "runtime": {"onnxruntime": Machine, "openvino": Machine},
    "data": {},
}


@pytest.fixture
def fake_components(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with _installed(monkeypatch):
        yield


@contextmanager
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def names(kind: str) -> tuple[str, ...]:
        return tuple(sorted(COMPONENTS[kind]))

    def get(kind: str, name: str) -> type[Any]:
        if name not in COMPONENTS[kind]:
            raise registry.RecipeError(f'unknown {kind} "{name}"; {registry.nearest(name, COMPONENTS[kind])}')
        return COMPONENTS[kind][name]

    monkeypatch.setattr(registry, "names", names)
    monkeypatch.setattr(registry, "get", get)
    yield
