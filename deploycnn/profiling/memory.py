"""Peak memory of loading a model and running it once, in a process of its own: the host's and the GPU's.

In this process memory of earlier models would be reused or counted again, so a fresh child does it: it
imports the runtime, notes what that takes, loads and runs the model, and reports the peak above that note.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deploycnn
from deploycnn import errors
from deploycnn.core import Artifact
from deploycnn.errors import ArtifactError, RuntimeUnavailable


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
    package_parent = str(Path(deploycnn.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package_parent, inherited]))}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "deploycnn.profiling.memory_child"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environ,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailable(f"{spec}: {artifact.path}: no result within {timeout_s:.0f} s") from error
    return _read(child.returncode, child.stdout, child.stderr, f"{spec}: {artifact.path}")


def _image_shape(artifact: Artifact) -> list[int]:
    shape = artifact.inputs[0].shape[1:] if artifact.inputs else ()
    sizes = [size for size in shape if size is not None]
    if not sizes or len(sizes) != len(shape):
        raise ArtifactError(
            f"{artifact.path}: its image size is not stated, so its memory cannot be measured"
        )
    return sizes


def _read(returncode: int, stdout: str, stderr: str, where: str) -> MemoryUse:
    """What the child said on its last line, as a result or as the error that it met."""
    lines = stdout.strip().splitlines()
    try:
        answer: Any = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        answer = None
    if isinstance(answer, Mapping) and "peak_bytes" in answer:
        return MemoryUse(**answer)
    if isinstance(answer, Mapping) and "error" in answer:
        kind = getattr(errors, str(answer["error"]))
        raise kind(answer["message"])
    if returncode < 0:
        raise ArtifactError(
            f"{where}: the process that ran it was killed by signal {-returncode} (no memory left?)"
        )
    raise RuntimeError(f"{where}: the child ended with {returncode} and without an answer:\n{stderr}")
