"""What a runtime and a session of it are.

A runtime is named in recipes as ``name`` or ``name:mode`` (``onnxruntime:cpu``, ``openvino:bf16``,
``pytorch:compiled``), and on GPUs options may follow the mode, each behind a plus sign
(``tensorrt:trt+graph+device``), so that the name of a row says how it was measured. What was asked for is what
runs: a provider that does not load is a ``RuntimeUnavailable``, never another device's numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
        device: Where it computed: "cpu" or "cuda".
        clock: What took the time of a bound call: "host", or "cuda events" recorded on the session's stream.
        transfers: Whether a bound call copies its inputs to the device and its outputs back; ``None`` on the CPU.
    """

    provider: str
    precision: str
    threads: int
    device: Literal["cpu", "cuda"] = "cpu"
    clock: Literal["host", "cuda events"] = "host"
    transfers: bool | None = None


class Session(ABC):
    """A loaded model, ready to run. Sessions stay valid side by side until closed."""

    executed: Executed

    @abstractmethod
    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Outputs for preprocessed images, in graph order."""

    @abstractmethod
    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], float | None]:
        """A call that runs once on ``images_NCHW`` and returns when the outputs are complete.

        Inputs (and, where the runtime can, outputs) are bound beforehand: this is what gets timed. The call
        returns the milliseconds that the device's own events measured, or ``None``: then the caller's clock
        counts. ``executed.clock`` says which.
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
    options: tuple[str, ...] = ()

    @classmethod
    def options_for(cls, mode: str) -> tuple[str, ...]:  # noqa: ARG003 - for subclasses
        """Options that may follow ``mode`` in a spec, in the order in which they are written."""
        return ()

    @classmethod
    def device_of(cls, mode: str) -> Literal["cpu", "cuda"]:  # noqa: ARG003 - for subclasses
        """Where ``mode`` computes."""
        return "cpu"

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
    """Split ``name[:mode][+option...]``, check it all, and fill in the default mode.

    Returns:
        The name, and the mode with its options in their own order: ``("tensorrt", "trt+graph+device")``.

    Raises:
        RecipeError: no such runtime, mode or option; names the nearest.
    """
    from deploycnn import registry

    name, _, rest = spec.partition(":")
    mode, *given = rest.split("+")
    cls: type[Runtime] = registry.get("runtime", name)
    if mode and mode not in cls.modes:
        raise RecipeError(f'runtime "{spec}": unknown mode "{mode}"; {nearest(mode, cls.modes)}')
    mode = mode or cls.modes[0]
    known = cls.options_for(mode)
    for option in given:
        if option not in known:
            raise RecipeError(
                f'runtime "{spec}": unknown option "{option}" of {name}:{mode}; {nearest(option, known)}'
            )
    return name, "+".join([mode, *(option for option in known if option in given)])


def create(spec: str) -> Runtime:
    """The runtime written as ``name[:mode][+option...]``.

    Raises:
        RecipeError: no such runtime, mode or option.
    """
    from deploycnn import registry

    name, rest = parse_spec(spec)
    mode, *options = rest.split("+")
    chosen: dict[str, Any] = {"options": tuple(options)} if options else {}
    runtime: Runtime = registry.get("runtime", name)(mode=mode, **chosen)
    return runtime


#: Options of GPU runtimes that say what is timed and how one waits, not what is computed.
TIMING_OPTIONS = ("device", "flush-l2", "blocking")


def untimed(spec: str) -> str:
    """The spec without the options that only matter for timing: the outputs are the same without them.

    >>> untimed("tensorrt:trt+graph+device")
    'tensorrt:trt+graph'
    """
    mode, *options = spec.split("+")
    return "+".join([mode, *(option for option in options if option not in TIMING_OPTIONS)])
