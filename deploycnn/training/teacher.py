"""Teachers that only answer: on a CPU their graph runs in onnxruntime.

PyTorch runs a model for inference module by module, as it does for training; onnxruntime folds and fuses, and keeps
images in the layout that its kernels want. A ResNet-56 on 128 CIFAR images took 0.39 of PyTorch's time on two AVX2
cores, where a teacher without that is more than a third of a step of distillation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from torch import Tensor, nn

from deploycnn.core import Context
from deploycnn.errors import PassRequirementError
from deploycnn.graph.bridge import to_torch
from deploycnn.graph.export import NATIVE_OPSET, export_onnx
from deploycnn.graph.observe import image_input
from deploycnn.graph.parity import Evaluate, Tolerance, evaluator, measure_parity, module_evaluator
from deploycnn.models.inspection import inspect_model
from deploycnn.optional import installed
from deploycnn.training.device import model_to

#: Multiply-accumulates of all that a teacher is asked from which on exporting it (5 to 20 s) pays.
_WORTH = 2e12
#: Rounding differs from PyTorch's and nothing else; soft targets do not feel it.
_TOLERANCE = Tolerance(absolute=1e-3, relative=1e-3)


class GraphTeacher(nn.Module):
    """An ONNX classifier as a module without parameters and gradients."""

    def __init__(self, graph: ModelProto, threads: int) -> None:
        """Open a session with so many CPU threads."""
        super().__init__()
        self._evaluate: Evaluate = evaluator(graph, threads=threads)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, K), float32, on the CPU."""
        content: npt.NDArray[np.float32] = np.ascontiguousarray(images_NCHW.numpy(force=True), np.float32)
        return torch.from_numpy(self._evaluate(content)[0])


def answering(teacher: nn.Module, images_NCHW: Tensor, *, views: int, name: str, ctx: Context) -> nn.Module:
    """The fastest form of a teacher that is asked for nothing but logits, on the CPU.

    Which form is decided by counting, never by timing: the same recipe must give the same bits again.

    Args:
        teacher: On the CPU, in evaluation mode.
        images_NCHW: Some real images, on which both forms are compared.
        views: How many images it will see.
        name: For the log.
        ctx: Threads and log.

    Returns:
        ``teacher`` itself where onnxruntime is not installed, exporting takes longer than it saves, or the graph
        cannot be made or computes something else, which the log then tells.
    """
    if not installed("onnxruntime"):
        return teacher
    shape = (int(images_NCHW.shape[1]), int(images_NCHW.shape[2]), int(images_NCHW.shape[3]))
    if views * (inspect_model(teacher, shape, name=name).macs or 0) < _WORTH:
        return teacher
    try:
        graph = export_onnx(teacher, shape, opset=NATIVE_OPSET)
    except PassRequirementError as error:
        ctx.log.warning("the teacher %s is computed by PyTorch, which is slower: %s", name, error)
        return teacher
    found = GraphTeacher(graph, ctx.threads)
    parity = measure_parity(
        module_evaluator(teacher),
        module_evaluator(found),
        images_NCHW.numpy(),
        batch_sizes=(len(images_NCHW),),
        tolerance=_TOLERANCE,
        source="val images",
        against="pytorch",
    )
    if not (parity.worst_ratio is not None and parity.worst_ratio <= 1.0):
        ctx.log.warning(
            "the teacher %s is computed by PyTorch, which is slower: its ONNX graph differs by %.3g",
            name,
            parity.max_abs_error,
        )
        return teacher
    ctx.log.info("the teacher %s is computed by onnxruntime", name)
    return found


def graph_teacher(model: ModelProto, ctx: Context) -> nn.Module:
    """A float graph that only teaches, where and as it is computed fastest: as a module where that is not onnxruntime.

    Raises:
        PassRequirementError: a module is needed, and the bridge lacks an operator (named).
    """
    _, (batch, *_) = image_input(model)
    if ctx.device == "cpu" and batch is None and installed("onnxruntime"):
        return GraphTeacher(model, ctx.threads)
    return model_to(to_torch(model).module.eval().requires_grad_(False), ctx.device)
