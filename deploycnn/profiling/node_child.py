"""The process that ``deploycnn.profiling.nodes`` starts for onnxruntime on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploycnn.profiling.child import serve
from deploycnn.profiling.inputs import noise
from deploycnn.profiling.nodes import onnxruntime_node_ms


def times(request: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by node."""
    batch_size, *shape = request["shape"]
    return onnxruntime_node_ms(
        Path(request["path"]), noise(batch_size, shape, 0), request["threads"], request["mode"]
    )


def main() -> None:
    """Answer the request on stdin."""
    serve(times)


if __name__ == "__main__":
    main()
