"""What runs a model on the GPU: a stream, buffers in device memory, and page-locked twins of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycnn.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.engines.flavour import IoTensor
    from deploycnn.gpu.device import Buffer, Device

#: Members of TensorRT's ``IExecutionContext`` that are used here; a test holds them against each flavour's bindings.
USED = (
    "execute_async_v3", "get_tensor_shape", "set_input_shape", "set_optimization_profile_async", "set_tensor_address",
)  # fmt: skip


class Lane(ABC):
    """A stream with one input and some outputs in device memory, and their page-locked twins on the host."""

    def __init__(self, device: Device) -> None:
        """Make the stream; buffers come with ``_allocate``."""
        self._device = device
        self.stream = device.stream()
        self._handle = device.handle(self.stream)
        self._buffers: list[Buffer] = []
        self._host: list[npt.NDArray[Any]] = []

    def _allocate(self, tensors: Sequence[tuple[Sequence[int], str]]) -> None:
        """Buffers for these shapes and element types: the input, then the outputs."""
        import numpy as np

        self._buffers, self._host = [], []  # freed before the new ones are asked for
        for shape, dtype in tensors:
            self._buffers.append(self._device.allocate(math.prod(shape) * np.dtype(dtype).itemsize))
            self._host.append(self._device.pinned(shape, dtype))

    @abstractmethod
    def execute(self) -> None:
        """Enqueue the model on what lies in device memory."""

    @property
    def host_outputs(self) -> list[npt.NDArray[Any]]:
        """Page-locked; filled by ``with_transfers`` once the stream is done."""
        return self._host[1:]

    def set_input(self, images: npt.NDArray[np.float32]) -> None:
        """Put ``images`` into the page-locked memory that uploads read."""
        self._host[0][...] = images

    def with_transfers(self) -> None:
        """Enqueue the upload, the model and the downloads."""
        device, stream = self._device, self.stream
        device.upload(self._buffers[0], self._host[0], stream)
        self.execute()
        for host, buffer in zip(self._host[1:], self._buffers[1:], strict=True):
            device.download(host, buffer, stream)

    def synchronize(self) -> None:
        """Wait until the stream is done."""
        self._device.synchronize(self.stream)

    def run(self, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Upload, compute, download; the outputs as float32 of the caller's own."""
        import numpy as np

        self.set_input(images)
        self.with_transfers()
        self.synchronize()
        return [np.array(output, dtype=np.float32) for output in self.host_outputs]


class EngineLane(Lane):
    """An execution context of an engine, with its stream and buffers."""

    def __init__(
        self,
        context: Any,
        tensors: tuple[IoTensor, Sequence[IoTensor]],
        device: Device,
        path: Path,
        keep_cache: Callable[[], None],
    ) -> None:
        """Take over ``context`` of an engine with these ``tensors``: its input, and its outputs."""
        super().__init__(device)
        self._context, self._path = context, path
        self._input, self._outputs = tensors
        self.keep_cache = keep_cache
        self._profile = 0
        self._prepared: tuple[int, ...] | None = None

    @property
    def context(self) -> Any:
        """The execution context, for what a lane does not offer."""
        return self._context

    def shapes(self, shape: Sequence[int], profile: int, handle: int) -> dict[str, tuple[int, ...]]:
        """Set the input's shape; shapes of the outputs that follow from it."""
        context = self._context
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, handle):
                raise self._failed("choosing the optimization profile")
            self._profile = profile
        if not context.set_input_shape(self._input.name, tuple(shape)):
            raise self._failed(f"an input of {dims(shape)}")
        found = {tensor.name: tuple(context.get_tensor_shape(tensor.name)) for tensor in self._outputs}
        for name, output in found.items():
            if min(output, default=0) < 0:
                raise ArtifactError(
                    f'{self._path}: the shape of output "{name}" depends on the data; such engines are not supported'
                )
        return found

    def prepare(self, shape: Sequence[int], profile: int) -> None:
        """Allocate buffers for inputs of ``shape``, unless they are there."""
        if self._prepared == tuple(shape):
            return
        self._prepared = None
        outputs = self.shapes(shape, profile, self._handle)
        self._allocate(
            [(shape, self._input.dtype), *((outputs[tensor.name], tensor.dtype) for tensor in self._outputs)]
        )
        self._point([buffer.address for buffer in self._buffers])
        self._prepared = tuple(shape)

    def _point(self, addresses: Sequence[int]) -> None:
        for tensor, address in zip([self._input, *self._outputs], addresses, strict=True):
            if not self._context.set_tensor_address(tensor.name, address):
                raise self._failed(f'the address of "{tensor.name}"')

    def execute(self) -> None:
        """Enqueue the engine."""
        if not self._context.execute_async_v3(self._handle):
            raise self._failed("running it")

    def execute_at(self, addresses: Sequence[int], handle: int) -> None:
        """Enqueue the engine on another stream, with inputs and outputs at ``addresses``."""
        self._prepared = None
        self._point(addresses)
        if not self._context.execute_async_v3(handle):
            raise self._failed("running it")

    def _failed(self, doing: str) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: TensorRT fails at {doing}; build the engine anew on this machine, and see its log"
        )


def dims(shape: Sequence[int]) -> str:
    """A shape as messages say it: 8 x 3 x 32 x 32."""
    return " x ".join(map(str, shape))
