"""What must hold of a pruned model beside its forward pass, which surgery proves: it reloads, and it exports."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.graph.export import NATIVE_OPSET, export_onnx
from deploycnn.graph.parity import Tolerance, evaluator, measure_parity, module_evaluator
from deploycnn.models.artifact import load_model

#: Wider than that of the pass ``export``, which judges trained weights: this is to tell wrong channels from rounding.
_TOLERANCE = Tolerance(absolute=1e-3, relative=1e-3)


def check_stored(model: nn.Module, images: Tensor, folder: Path) -> None:
    """What is loaded again must compute the same bits.

    Raises:
        RuntimeError: it does not; the stored delta misses something.
    """
    with torch.no_grad():
        if not torch.equal(load_model(folder)(images), model.eval()(images)):
            raise RuntimeError("the pruned model computes something else after it is stored and loaded")


def check_exported(
    model: nn.Module, images: Tensor, dense: Path, *, threads: int, log: logging.Logger
) -> Json | None:
    """The pruned model's ONNX graph must compute what the model computes; returns how far it is from that.

    Args:
        model: Pruned, on the CPU.
        images: (N, C, H, W).
        dense: The stored model before pruning. One that cannot be exported either is let pass, and the log says so.
        threads: CPU threads.
        log: Of the pass.

    Raises:
        RuntimeError: pruning made it impossible to export.
        ParityError: the graph computes something else.
    """
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    model.eval()
    try:
        graph = export_onnx(model, shape, opset=NATIVE_OPSET)
    except PassRequirementError as error:
        try:
            export_onnx(load_model(dense).eval(), shape, opset=NATIVE_OPSET)
        except PassRequirementError:
            log.warning("not compared with its ONNX graph, as the model had none before pruning: %s", error)
            return None
        raise RuntimeError(f"the pruned model can no longer be exported ({error})") from error
    parity = measure_parity(
        module_evaluator(model),
        evaluator(graph, threads=threads),
        images.numpy(),
        batch_sizes=(1, len(images)),
        tolerance=_TOLERANCE,
        source="random images",
        against="pytorch",
    )
    parity.check("prune: the pruned model's ONNX graph")
    return {"max_abs_error": parity.max_abs_error, "max_rel_error": parity.max_rel_error}
