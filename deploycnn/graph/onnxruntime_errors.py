"""What ONNX Runtime raises, as errors of this package: a model that it cannot load or run is no bug of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploycnn.errors import ArtifactError, one_line


@contextmanager
def onnxruntime_errors(path: Path | str, version: str) -> Iterator[None]:
    """Turn ONNX Runtime's own exceptions into ArtifactError; anything else passes."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        yield
    except state.InvalidProtobuf as error:
        raise ArtifactError(
            f"{path}: not an ONNX file, or cut short ({_onnxruntime_reason(error)}); copy it again"
        ) from error
    except state.NotImplemented as error:
        raise ArtifactError(
            f"{path}: an operator is not supported by onnxruntime: {_onnxruntime_reason(error)}"
        ) from error
    except (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.NoModel, state.NoSuchFile,
        state.NotFound, state.EPFail, state.RuntimeException,
    ) as error:  # fmt: skip
        raise ArtifactError(
            f"{path}: onnxruntime {version} cannot load or run it: {_onnxruntime_reason(error)}"
        ) from error


def _onnxruntime_reason(error: Exception) -> str:
    text = str(error).rpartition(" failed:")[2]
    opset = re.search(
        r"Opset (\d+) is under development.*support for domain (\S+) is till opset (\d+)", text, re.DOTALL
    )
    if opset:
        return f"it is made for opset {opset[1]} of {opset[2]}, known up to {opset[3]}; upgrade or re-export"
    return one_line(text.removeprefix("[ONNXRuntimeError] : "))
