"""Engines among the models that `profile` is given: whether they may be loaded, and what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploycnn import evidence
from deploycnn.core import MAIN_FILE, Artifact, Facts, TensorSpec
from deploycnn.engines import building, device, flavour, vouch
from deploycnn.engines.auditing import engine_file
from deploycnn.engines.flavour import Name
from deploycnn.errors import ArtifactError
from deploycnn.files import sha256_of

#: What a file's ending says that it holds.
ENDINGS = (".engine", ".plan", ".trt")

_SPECS: Mapping[Name, str] = {"tensorrt": "tensorrt:trt", "tensorrt-rtx": "tensorrt:rtx"}


def is_engine(path: Path) -> bool:
    """Whether ``path`` is an engine file, or the folder of an artifact or bundle that holds one."""
    return path.suffix in ENDINGS or (path / MAIN_FILE["engine"]).is_file()


def require_loadable(path: Path, *, trust: bool) -> None:
    """Check an engine before anything is written.

    Raises:
        ArtifactError: it is missing, has changed, or nothing vouches for it and ``trust`` is not set.
    """
    vouch.read_record(engine_file(path), trust=trust)


def runtimes(models: Sequence[Path], asked: Sequence[str], *, trust: bool) -> tuple[str, ...]:
    """Runtime specs for these models: those that were asked for, else those that made the engines.

    ``trust`` is handed to the TensorRT runtimes among them as their option.
    """
    specs = list(asked)
    if not specs:
        for model in models:
            if is_engine(model):
                record = vouch.read_record(engine_file(model), trust=trust)
                names: tuple[Name, ...] = (record.flavour,) if record else _installed()
                specs += [_SPECS[name] for name in names if _SPECS[name] not in specs]
    return tuple(
        f"{spec}+trust" if trust and spec.startswith("tensorrt") and "trust" not in spec.split("+") else spec
        for spec in specs
    )


def bring(path: Path, name: str, *, trust: bool) -> evidence.Entry:
    """An engine that is no artifact of a run, as an entry of the report.

    Raises:
        ArtifactError: see :func:`require_loadable`; or the engine cannot be loaded.
        RuntimeUnavailable: no manifest tells its inputs, and there is no GPU to load it on.
    """
    engine = engine_file(path)
    record = vouch.read_record(engine, trust=trust)
    described = engine.with_name("deploy.json")
    content: Mapping[str, Any] = (
        json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    )
    if content:
        try:
            inputs, outputs = _specs(content["inputs"]), _specs(content["outputs"])
            classes = tuple(content.get("classes", ()))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{described}: does not tell inputs, outputs and classes as bundles do ({error!r}); export it again"
            ) from error
    else:
        (inputs, outputs), classes = _ask_engine(engine), ()
    key = sha256_of(engine)
    facts = Facts(
        size_bytes=engine.stat().st_size,
        preprocessing=content.get("preprocessing"),
        classes=classes,
        precision="engine",
        record={"engine": record.to_json()} if record else {},
    )
    artifact = Artifact(
        key=key, format="engine", path=engine, inputs=inputs, outputs=outputs, parents=(), facts=facts
    )
    return evidence.Entry(name=name, passes=(), artifact=artifact)


def layer_times(path: Path, batch_size: int, *, trust: bool) -> dict[str, float]:
    """Milliseconds of each layer of an engine on this GPU, by TensorRT's profiler, for images of noise.

    Raises:
        ArtifactError: see :func:`bring`; or ``batch_size`` is outside the engine's profile.
        RuntimeUnavailable: there is no GPU, or not enough memory on it.
    """
    import numpy as np

    from deploycnn.runtimes.base import create
    from deploycnn.runtimes.tensorrt import EngineSession

    device.require_gpu()
    artifact = bring(path, path.stem, trust=trust).artifact
    if artifact is None:
        raise ArtifactError(f"{path}: holds no engine")
    [spec] = runtimes([path], (), trust=trust)
    session = create(spec).open(artifact, batch_size=batch_size, threads=1)
    try:
        if not isinstance(session, EngineSession):
            raise ArtifactError(f"{path}: {spec} tells no times of layers")
        shape = (batch_size, *session.input.shape[1:])
        return session.layer_times(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    finally:
        session.close()


def _installed() -> tuple[Name, ...]:
    found = tuple(name for name in flavour.MODULES if flavour.is_installed(name))
    return found[:1] or ("tensorrt",)


def _specs(items: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=item["name"], dtype=item["dtype"], shape=tuple(item["shape"])) for item in items
    )


def _ask_engine(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an engine that nothing describes, from the engine itself."""
    device.require_gpu()
    plan = building.read_plan(path)
    for name in _installed():
        found = flavour.find(name)
        loaded = found.deserialize(plan, what=str(path))
        tensors = found.io_tensors(loaded)
        specs = [
            TensorSpec(
                name=item.name,
                dtype=item.dtype,
                shape=tuple(None if axis == -1 else axis for axis in item.shape),
            )
            for item in tensors
        ]
        inputs = tuple(spec for spec, item in zip(specs, tensors, strict=True) if item.is_input)
        return inputs, tuple(spec for spec in specs if spec not in inputs)
    raise ArtifactError(f"{path}: no TensorRT is installed that could load it")
