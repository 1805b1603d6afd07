"""PyTorch to ONNX by the dynamo exporter: clean, checked, readable; same weights make the same bytes."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import nn

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.graph.cleanup import simplify
from deploycnn.graph.metadata import describe_task, set_metadata, strip_exporter_notes
from deploycnn.graph.model import MAX_SELF_CONTAINED_BYTES, opset_of, shape_of
from deploycnn.graph.names import rename_after_modules
from deploycnn.graph.opset import lower_opset_to_17

INPUT = "images"
OUTPUT = "logits"
BATCH = "batch"

#: The oldest operator set that the dynamo exporter writes itself.
NATIVE_OPSET = 18

#: Neither 1 (which torch.export would specialize on) nor a size that parity is measured at.
_EXAMPLE_BATCH = 2


def export_onnx(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    *,
    opset: int,
    preprocessing: Json | None = None,
    classes: Sequence[str] = (),
) -> ModelProto:
    """Export a classifier: float32 images (N, C, H, W) -> logits (N, classes), N dynamic and named ``batch``.

    Batch norms that follow a convolution are folded into it; others stay. Nodes are named after the modules
    they come from. Nothing of this machine (paths, stack traces, times) gets into the file.

    Args:
        model: On the CPU, in float32. It is exported in eval mode; its own mode is restored.
        input_shape: (C, H, W).
        opset: Version of the ONNX operator set, at least 17.
        preprocessing: JSON to keep in the file's metadata.
        classes: Names to keep in the file's metadata.

    Raises:
        PassRequirementError: the model cannot be exported; names the exporter's reason.
    """
    example = torch.randn(_EXAMPLE_BATCH, *input_shape, generator=torch.Generator().manual_seed(0))
    training = model.training
    model.eval()
    try:
        _check_output(model, example)
        with _out_of_place(model, example):
            exported = _run_exporter(model, example, opset)
    finally:
        model.train(training)
    clean = simplify(exported)
    rename_after_modules(clean, model.state_dict())
    strip_exporter_notes(clean)
    set_metadata(clean, {})
    _relax_reshapes(clean)
    if opset < NATIVE_OPSET:
        clean = lower_opset_to_17(clean)
    clean.graph.name = "main"
    clean.producer_name, clean.producer_version = "deploycnn", ""
    describe_task(clean, preprocessing, classes)
    _check(clean, opset)
    return clean


def _check_output(model: nn.Module, example: torch.Tensor) -> None:
    with torch.inference_mode():
        output = model(example)
    if not isinstance(output, torch.Tensor):
        raise PassRequirementError(
            f"export: {type(model).__name__} returns {type(output).__name__}; "
            "it must return one tensor of logits"
        )


@contextlib.contextmanager
def _out_of_place(model: nn.Module, example: torch.Tensor) -> Iterator[None]:
    """Let activations make new tensors, where the model computes the same then.

    The exporter takes in-place ones apart into arithmetic of symbolic shapes, which takes half of the time of a
    MobileNet. Where something else reads the tensor that an activation changes, they stay as they are.
    """
    changed: list[Any] = [module for module in model.modules() if vars(module).get("inplace") is True]
    if not changed:
        yield
        return
    # Large values too: an activation that leaves the example as it is would change nothing for who else reads it.
    examples = (example, 100 * example)
    try:
        with torch.inference_mode():
            expected = [model(images) for images in examples]
            for module in changed:
                module.inplace = False
            same = all(torch.equal(model(given), was) for given, was in zip(examples, expected, strict=True))
        if not same:
            for module in changed:
                module.inplace = True
        yield
    finally:
        for module in changed:
            module.inplace = True


def _run_exporter(model: nn.Module, example: torch.Tensor, opset: int) -> ModelProto:
    try:
        # Nothing is trained here; with gradients the exporter traces for autograd too, which takes a fifth longer.
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                # 17 is reached from the cleaned graph, where little of what changed in 18 is left.
                opset_version=max(opset, NATIVE_OPSET),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch.onnx.errors.UnsupportedOperatorError) as error:
        raise PassRequirementError(
            f"export: {type(model).__name__} cannot be exported to ONNX: {essential_reason(error)}"
        ) from error
    if program is None:
        raise TypeError("torch.onnx.export returned nothing although no file was named")
    return program.model_proto


def essential_reason(error: BaseException) -> str:
    """One line of what went wrong at the root of a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else "no reason given"
    return f"{type(error).__name__}: {first[:300]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: it prints progress, warns about itself and logs graph passes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _relax_reshapes(model: ModelProto) -> None:
    """Drop ``allowzero``: no target shape of ours holds a zero, and not every runtime knows the attribute."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        if 0 not in onnx.numpy_helper.to_array(constants[node.input[1]]):
            kept = [held for held in node.attribute if held.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _check(model: ModelProto, opset: int) -> None:
    """The promises of ``export_onnx``, checked on the result."""
    if opset_of(model) != opset:
        raise PassRequirementError(
            f"export: opset {opset} cannot be made from this model (got {opset_of(model)}); use opset 18"
        )
    batch = [(shape_of(value) or (1,))[0] for value in (*model.graph.input, *model.graph.output)]
    if batch != [None] * len(batch):
        raise PassRequirementError(
            "export: the model fixes its batch size, so its batch axis cannot be dynamic"
        )
    if model.ByteSize() < MAX_SELF_CONTAINED_BYTES:
        onnx.checker.check_model(model, full_check=True)
