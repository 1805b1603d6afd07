"""TensorRT's failures as ours: which node or layer, why, and which setting mends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycnn.engines.log import Log
from deploycnn.errors import ArtifactError, DeployCNNError, PassRequirementError, RuntimeUnavailable

if TYPE_CHECKING:
    from deploycnn.engines.flavour import Flavour
    from deploycnn.engines.settings import BuildSettings

#: What the CUDA runtime says where there is no driver, one that is too old, or no device.
_NO_GPU = re.compile(
    r"cudaError (35|100|101|999)\b|no CUDA-capable device|CUDA driver version is insufficient"
)
_CANCELLED = re.compile(r"BuildCancell?ed|Build cancell?ed", re.IGNORECASE)
_WORKSPACE = re.compile(r"workspace", re.IGNORECASE)
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|cudaErrorMemoryAllocation|MEM_ALLOC|memory allocation", re.IGNORECASE
)
_VERSION = re.compile(
    r"version tag|Version mismatch|VERSION_MISMATCH|serialized with|built with", re.IGNORECASE
)
_DEVICE = re.compile(r"compute capability|different.*device|UNSUPPORTED_CC", re.IGNORECASE)
_MALFORMED = re.compile(
    r"magicTag|magic tag|header|corrupt|Serialization assertion|plan file|MALFORMED", re.IGNORECASE
)
#: Where in TensorRT's sources a message comes from. A bracket goes with its partner or not at all.
_LOCATION = re.compile(
    r"\s*(?:\(In \w+ at /[^\s()]+:\d+\)|In \w+ at /[^\s()]+:\d+|at /[^\s()]+:\d+"
    r"|\[\w+\.cpp::\w+::\d+\]|\[\w+\.(?:cpp|h):\d+: \w+\])"
)
_AT_WORK = re.compile(r"=+ Computing costs for (.+)|Cannot compile operation '([^']+)'|failed .*node (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserFailure:
    """A node that the ONNX parser refuses."""

    node: str
    operator: str
    why: str


def essence(text: str, limit: int = 220) -> str:
    """A message on one line without source locations and macro noise, at most ``limit`` characters."""
    text = _LOCATION.sub("", text)
    text = re.sub(r"I\w+::\w+: Error Code \d+: ", "", text)
    text = " ".join(text.split()).strip(" .;")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parser_error(failures: Sequence[ParserFailure], what: str, flavour: Flavour) -> DeployCNNError:
    """One line that names every node that the parser refused."""
    count = f"{len(failures)} nodes" if len(failures) != 1 else "a node"
    listing = "; ".join(
        f'"{failure.node or "unnamed"}" ({failure.operator}): {essence(failure.why, 120)}'
        for failure in failures
    )
    return PassRequirementError(
        f"build_engine: {flavour.name} {flavour.version} does not take {count} of {what}: {listing}; "
        "export with other operators or opset, or serve this model with onnxruntime"
    )


def layer_at_work(log: Log) -> str:
    """The layer that the builder was at when it last said so, by its ONNX nodes; empty if it never did."""
    for _, text in reversed(log.records):
        found = _AT_WORK.search(text)
        if found:
            name = next(group for group in found.groups() if group)
            foreign = re.search(r"ForeignNode\[(.+)\]", name)
            return foreign[1].replace("...", " ... ") if foreign else name.strip("{}")
    return ""


def build_error(log: Log, what: str, flavour: Flavour, settings: BuildSettings) -> DeployCNNError:
    """Why a build gave no engine."""
    errors = [text for text in log.errors() if "checkMacros" not in text]
    said = "\n".join(errors) or "it does not say why"
    first = essence(errors[-1] if errors else said)
    layer = layer_at_work(log)
    at = f' at layer "{layer}"' if layer else ""
    name = f"{flavour.name} {flavour.version}"
    if _MEMORY.search(said):
        return memory_error(log, f"building {what}")
    if _WORKSPACE.search(said):
        given = (
            "all memory" if settings.workspace_bytes is None else f"{settings.workspace_bytes / 2**20:g} MiB"
        )
        return PassRequirementError(
            f"build_engine: {what}: out of workspace{at} ({given} allowed); raise build_engine.workspace_mib, "
            f"or lower the largest batch (now {settings.batch[2]})"
        )
    if _NO_GPU.search(said):
        return RuntimeUnavailable(
            f"build_engine: {name} needs a GPU to build this, and finds none or too old a driver ({first}); "
            "build on the GPU host, or ahead of time with the target tensorrt-rtx"
        )
    if "Cannot compile operation" in said:
        return PassRequirementError(
            f"build_engine: {what}: {first}; leave that GPU out of build_engine.compute_capabilities or use fp16"
        )
    return PassRequirementError(
        f"build_engine: {name} cannot build {what}{at}: {first}; log.txt of the failed step holds all it said"
    )


def was_cancelled(log: Log) -> bool:
    """Whether the build ended because the progress monitor asked it to."""
    return any(_CANCELLED.search(text) for text in log.errors())


def memory_error(log: Log, doing: str) -> DeployCNNError:
    """Device memory ran out."""
    layer = layer_at_work(log)
    at = f' at layer "{layer}"' if layer else ""
    said = essence(log.errors()[-1]) if log.errors() else "no reason given"
    return ArtifactError(
        f"{doing}: out of device memory{at} ({said}); lower build_engine.max_batch or build_engine.workspace_mib, "
        "or free memory on the GPU"
    )


def loading_error(log: Log, what: str, flavour: Flavour) -> DeployCNNError:
    """Why an engine could not be loaded."""
    errors = log.errors()
    said = "\n".join(errors)
    name = f"{flavour.name} {flavour.version}"
    first = essence(errors[0]) if errors else "no reason given"
    if _NO_GPU.search(said):
        return RuntimeUnavailable(
            f"{what}: no GPU that {name} can use: there is none, or the driver is too old for this CUDA; "
            "check `nvidia-smi` and update the driver"
        )
    if _MEMORY.search(said):
        return memory_error(log, f"loading {what}")
    if _VERSION.search(said):
        return ArtifactError(f"{what}: built by another version than {name} ({first}); build it anew")
    if _DEVICE.search(said):
        return ArtifactError(f"{what}: built for another GPU ({first}); build it on this one")
    if _MALFORMED.search(said):
        return ArtifactError(f"{what}: not an engine of {name}, or damaged ({first}); build it anew")
    return ArtifactError(f"{what}: {name} does not load it ({first}); build it anew")
