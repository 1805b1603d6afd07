"""CUDA graphs through the driver API (CUDA Driver API, "Stream Management" and "Graph Management")."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from deploycnn.errors import RuntimeUnavailable

#: ``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``: what other threads do meanwhile does not void the capture.
_THREAD_LOCAL = 1

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")


@functools.cache
def driver() -> Any:
    """The CUDA driver library.

    Raises:
        RuntimeUnavailable: there is none.
    """
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeUnavailable("no NVIDIA driver (libcuda is not found); CUDA graphs need it")


class Graph:
    """An instantiated graph; freed with the object."""

    def __init__(
        self, library: Any, executable: ctypes.c_void_p, graph: ctypes.c_void_p, stream: int
    ) -> None:
        self._library, self._executable, self._graph = library, executable, graph
        self._stream = ctypes.c_void_p(stream)

    def __call__(self) -> None:
        """Launch it on the stream on which it was captured."""
        _check(
            self._library,
            self._library.cuGraphLaunch(self._executable, self._stream),
            "the graph's launch fails",
        )

    def __del__(self) -> None:
        self._library.cuGraphExecDestroy(self._executable)
        self._library.cuGraphDestroy(self._graph)


def capture(work: Callable[[], None], stream: int, library: Any = None) -> Graph:
    """Capture what ``work`` enqueues on the stream with this handle, and instantiate it.

    Raises:
        RuntimeUnavailable: something in it cannot be captured; also where ``work`` itself raises it.
    """
    library = library if library is not None else driver()
    handle, graph, executable = ctypes.c_void_p(stream), ctypes.c_void_p(), ctypes.c_void_p()
    _check(
        library,
        library.cuStreamBeginCapture_v2(handle, ctypes.c_int(_THREAD_LOCAL)),
        "a capture cannot be begun",
    )
    try:
        work()
    except BaseException:
        # the stream must not stay in capture mode
        if library.cuStreamEndCapture(handle, ctypes.byref(graph)) == 0 and graph:
            library.cuGraphDestroy(graph)
        raise
    _check(
        library,
        library.cuStreamEndCapture(handle, ctypes.byref(graph)),
        "this model cannot be captured as a CUDA graph",
    )
    code = library.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    if code:
        library.cuGraphDestroy(graph)
    _check(library, code, "the captured graph cannot be instantiated")
    return Graph(library, executable, graph, stream)


def _check(library: Any, code: int, what: str) -> None:
    if code == 0:
        return
    name = ctypes.c_char_p()
    library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
    said = name.value.decode() if name.value else f"CUDA error {code}"
    raise RuntimeUnavailable(f"{what} ({said}); measure it without +graph")
