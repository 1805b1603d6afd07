"""What an engine build is asked for, and what is known of the engine that comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Literal

from annotated_types import Ge

from deploycnn.core import Json
from deploycnn.engines.names import Name
from deploycnn.errors import ArtifactError

#: Number of images.
Batch = Annotated[int, Ge(1)]

Hardware = Literal["none", "ampere_plus", "same_compute_capability"]
Verbosity = Literal["none", "layer_names_only", "detailed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """How to build. Precision is not among it: engines are strongly typed, so it is in the graph.

    Attributes:
        batch: Smallest batch, the one to optimize for, and the largest; a fixed batch in the graph overrides it.
        workspace_bytes: Scratch memory that one layer may take; ``None`` for all of the device.
        optimization_level: 0 (quickest build) to 5.
        tf32: Whether float32 matrix products may round their inputs to TF32's 10-bit mantissa.
        compute_capabilities: "8.6", ...; TensorRT-RTX only, none for Ampere and newer.
        hardware_compatibility: Other GPUs that must be served; ``tensorrt`` only.
        version_compatible: Load in newer versions too; ``tensorrt`` only.
        refittable: Weights can be replaced in the engine.
        weight_stripped: The engine holds no weights; they are put in from the ONNX file when it is loaded.
        sparse_weights: Use sparse kernels for weights with two zeros among each four.
        profiling_verbosity: How much the engine tells about its layers.
    """

    batch: tuple[int, int, int] = (1, 1, 16)
    workspace_bytes: int | None = None
    optimization_level: int = 3
    tf32: bool = False
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: Hardware = "none"
    version_compatible: bool = False
    refittable: bool = False
    weight_stripped: bool = False
    sparse_weights: bool = False
    profiling_verbosity: Verbosity = "detailed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """Where an engine may run: what the manifest says of it.

    Attributes:
        flavour: Which TensorRT built it.
        version: That TensorRT's version.
        gpu: Name of the GPU that it was built on; empty where it was built ahead of time.
        capability: That GPU's compute capability, "9.0"; empty likewise.
        compute_capabilities: Those that it was built for ahead of time; none means 8.0 and newer.
        hardware_compatibility: As in :class:`BuildSettings`.
        version_compatible: As in :class:`BuildSettings`.
        weight_stripped: As in :class:`BuildSettings`.
        batch: Smallest batch, the one that it was optimized for, and the largest.
        onnx_sha256: Of the file that it was built from.
    """

    flavour: Name
    version: str
    gpu: str
    capability: str
    compute_capabilities: tuple[str, ...]
    hardware_compatibility: Hardware
    version_compatible: bool
    weight_stripped: bool
    batch: tuple[Batch, Batch, Batch]
    onnx_sha256: str

    def to_json(self) -> Json:
        """As plain values."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, value: Json, where: str) -> EngineRecord:
        """Read what ``to_json`` gave.

        Raises:
            ArtifactError: a key is missing, unknown or ill-typed.
        """
        from pydantic import TypeAdapter, ValidationError

        known = {item.name for item in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != known:
            raise ArtifactError(f"{where}: says nothing usable of the engine; build it anew")
        try:
            return TypeAdapter(cls).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            raise ArtifactError(
                f"{where}: says nothing usable of the engine ({name} is {value[name]!r}); build it anew"
            ) from error
