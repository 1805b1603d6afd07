"""What a runtime and a session of it are.

A runtime is named in recipes as ``name`` or ``name:mode`` (``onnxruntime:cpu``, ``openvino:bf16``,
``pytorch:compiled``). What was asked for is what runs: a provider that does not load is a
``RuntimeUnavailable``, never another device's numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploycnn.errors import RecipeError, nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.core import Artifact, Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether a runtime works here; if not, why, and how to mend it."""

    ok: bool
    version: str = ""
    why: str = ""
    mend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What really ran, as the runtime itself reports it after loading.

    Attributes:
        provider: "CPUExecutionProvider", "CPU", "cuda:0", ...
        precision: Of the arithmetic: "f32", "bf16", "int8+f32", ...
        threads: CPU threads inside one inference.
    """

    provider: str
    precision: str
    threads: int


class Session(ABC):
    """A loaded model, ready to run. Sessions stay valid side by side until closed."""

    executed: Executed

    @abstractmethod
    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Outputs for preprocessed images, in graph order."""

    @abstractmethod
    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], None]:
        """A call that runs once on ``images_NCHW`` and returns when the outputs are complete.

        Inputs (and, where the runtime can, outputs) are bound beforehand: this is what gets timed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the model. Further calls are errors."""


@dataclass(frozen=True, kw_only=True)
class Runtime(ABC):
    """An inference runtime: ``runtimes/<name>.py``. Heavy imports live inside the methods."""

    #: Modes by name; the first is the default.
    modes: ClassVar[tuple[str, ...]]
    #: Artifact formats that it can open.
    accepts: ClassVar[tuple[Format, ...]]

    mode: str

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this mode works on this host. Never raises for a broken installation."""

    @abstractmethod
    def open(self, artifact: Artifact, *, batch_size: int, threads: int) -> Session:
        """Load ``artifact`` for batches of ``batch_size`` with ``threads`` intra-op threads.

        Raises:
            RuntimeUnavailable: the mode cannot run here.
            ArtifactError: the file cannot be loaded (damaged, unsupported opset or operator; named).
        """


def parse_spec(spec: str) -> tuple[str, str]:
    """Split ``name[:mode]``, check both, and fill in the default mode.

    Raises:
        RecipeError: no such runtime or mode; names the nearest.
    """
    from deploycnn import registry

    name, _, mode = spec.partition(":")
    cls: type[Runtime] = registry.get("runtime", name)
    if mode and mode not in cls.modes:
        raise RecipeError(f'runtime "{spec}": unknown mode "{mode}"; {nearest(mode, cls.modes)}')
    return name, mode or cls.modes[0]


def create(spec: str) -> Runtime:
    """The runtime written as ``name[:mode]``.

    Raises:
        RecipeError: no such runtime or mode.
    """
    from deploycnn import registry

    name, mode = parse_spec(spec)
    runtime: Runtime = registry.get("runtime", name)(mode=mode)
    return runtime
