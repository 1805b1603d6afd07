"""Peak memory of loading a model and running it once, in a process of its own: the host's and the GPU's.

In this process memory of earlier models would be reused or counted again, so a fresh child does it: it
imports the runtime, notes what that takes, loads and runs the model, and reports the peak above that note.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploycnn.core import Artifact
from deploycnn.errors import ArtifactError
from deploycnn.profiling.child import ask


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Memory of the child.

    Attributes:
        peak_bytes: Greatest growth over ``baseline_bytes`` while the model was loaded and run: its weights,
            the runtime's copies of them, and the activations of one batch.
        baseline_bytes: Interpreter and runtime, before the model.
        device_bytes: Device memory that the model took, where it ran on a GPU: weights, activations of one batch,
            workspace and what the runtime's allocator keeps. Read as free memory before and after, so other programs
            on the same GPU disturb it.
    """

    peak_bytes: int
    baseline_bytes: int
    device_bytes: int | None = None


def peak_memory_bytes(artifact: Artifact, spec: str, *, batch_size: int, threads: int = 1) -> int:
    """``peak_memory(...)`` where the model runs: device memory on a GPU, else resident memory."""
    found = peak_memory(artifact, spec, batch_size=batch_size, threads=threads)
    return found.peak_bytes if found.device_bytes is None else found.device_bytes


def peak_memory(
    artifact: Artifact, spec: str, *, batch_size: int, threads: int = 1, timeout_s: float = 600.0
) -> MemoryUse:
    """Load ``artifact`` in the runtime ``spec`` in a new process, run a batch, and read its peak memory.

    Costs the start of a process and the import of the runtime: one to several seconds.

    Raises:
        ArtifactError: the file cannot be loaded, its image size is not stated, or the process dies of it.
        RuntimeUnavailable: the runtime does not work here, or did not end in time.
    """
    request = {
        "format": artifact.format,
        "path": str(artifact.path.absolute()),
        "shape": [batch_size, *_image_shape(artifact)],
        "spec": spec,
        "threads": threads,
    }
    found = ask("deploycnn.profiling.memory_child", request, f"{spec}: {artifact.path}", timeout_s=timeout_s)
    return MemoryUse(**found)


def _image_shape(artifact: Artifact) -> list[int]:
    shape = artifact.inputs[0].shape[1:] if artifact.inputs else ()
    sizes = [size for size in shape if size is not None]
    if not sizes or len(sizes) != len(shape):
        raise ArtifactError(
            f"{artifact.path}: its image size is not stated, so its memory cannot be measured"
        )
    return sizes
