from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from deploycnn.core import Artifact, Context, Facts
from deploycnn.data.augment import Augmentation
from deploycnn.errors import ParityError, PassRequirementError, TrainingError
from deploycnn.graph.bridge import to_torch
from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import initializers
from deploycnn.graph.observe import observe
from deploycnn.graph.parity import evaluator
from deploycnn.graph.probe import parity_images
from deploycnn.models.cifar_resnet import PadShortcut
from deploycnn.quantization import packs, qat
from deploycnn.quantization.agreement import (
    Agreement,
    measure_agreement,
    measure_by_layer,
    saturates_here,
)
from deploycnn.quantization.insertion import build, ranges_needed
from deploycnn.quantization.packed import widen
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.qat_settings import QatSettings
from deploycnn.quantization.reconstruction import find_layers
from deploycnn.quantization.types import NumberFormat
from deploycnn.training import loop
from deploycnn.training.history import History
from deploycnn.training.losses import CrossEntropy, Distillation
from deploycnn.training.settings import TrainingSettings
from deploycnn.training.teacher import GraphTeacher
from tests.graph.nets import Residual, images, randomized
from tests.quantization.test_insertion import padded_shortcut
from tests.quantization.test_insertion import quantized as placed
from tests.training.support import make_context, make_data

DATA = make_data()
INT4 = NumberFormat(dtype="int4", symmetric=True)
INT8 = NumberFormat(dtype="int8", symmetric=True)
QUICK = TrainingSettings(
    epochs=12, batch_size=16, lr=1e-2, weight_decay=0.0, augment=Augmentation(crop_padding=1), keep="last"
)


def learn(model: nn.Module, folder: Path, epochs: int = 40) -> None:
    """Let a net tell the pictures apart."""
    settings = TrainingSettings(epochs=epochs, batch_size=16, optimizer="adamw", lr=2e-2, keep="last")
    loop.fit(model, DATA, settings, loss=CrossEntropy(), ctx=make_context(folder, DATA))


def to_graph(model: nn.Module) -> ModelProto:
    """Its float graph."""
    return prepare(export_onnx(model.eval(), (3, 8, 8), opset=18, classes=None))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    net = randomized(Residual(classes=3))
    learn(net, tmp_path_factory.mktemp("float"))
    return to_graph(net)


def quantize(full: ModelProto, weight: NumberFormat) -> ModelProto:
    plan = place(full, replace(packs.get("onnxruntime-cpu"), weight=weight))
    ranges: dict[str, tuple[float, float]] = {}

    def visit(name: str, content: npt.NDArray[np.float32]) -> None:
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(low, float(content.min())), max(high, float(content.max()))

    observe(full, ranges_needed(plan), [parity_images(DATA, (3, 8, 8), 30, 0)[0]], visit)
    return build(full, plan, ranges)


def tune(
    quantized: ModelProto, full: ModelProto, ctx: Context, settings: TrainingSettings = QUICK, **options: Any
) -> qat.Tuned:
    loss = Distillation(
        teacher=GraphTeacher(full, 1), method="kd", temperature=2.0, alpha=1.0, beta=0.0, label_weight=0.0
    )
    return qat.fine_tune(
        quantized, full, DATA, settings, loss=loss, ctx=ctx, **{"learn_scales": True, "parity_count": 30, **options}
    )  # fmt: skip


def error(full: ModelProto, model: ModelProto) -> float:
    batch = parity_images(DATA, (3, 8, 8), 30, 0)[0]
    expected, found = (evaluator(graph, integers=False)(batch)[0] for graph in (full, model))
    return float(np.square(expected - found).mean())


@pytest.fixture(scope="module")
def tuned(full: ModelProto, tmp_path_factory: pytest.TempPathFactory) -> qat.Tuned:
    ctx = make_context(tmp_path_factory.mktemp("qat"), DATA)
    # After 12 epochs it still depends on the seed how near it is.
    return tune(quantize(full, INT4), full, ctx, replace(QUICK, epochs=24))


def test_training_brings_the_quantized_graph_nearer_to_its_teacher(
    full: ModelProto, tuned: qat.Tuned
) -> None:
    assert error(full, tuned.model) < 0.6 * error(full, quantize(full, INT4))
    assert tuned.kept
    assert tuned.scales_learned > 6


def test_at_its_defaults_a_steep_net_trains_and_keeps_its_scales_positive(tmp_path: Path) -> None:
    """Behind folded batch norms gradients may be of any size: logits 400 times as large, and so are they."""
    net = randomized(Residual(classes=3))
    learn(net, tmp_path / "float", epochs=20)
    with torch.no_grad():
        net.head.weight.mul_(400)
        net.head.bias.mul_(400)
    full = to_graph(net)
    settings = QatSettings(epochs=8, batch_size=16, augment=Augmentation(), keep="last")
    found = qat.fine_tune(
        quantize(full, INT4),
        full,
        DATA,
        settings,
        loss=Distillation(teacher=GraphTeacher(full, 1), method=settings.method, **settings.weights),
        ctx=make_context(tmp_path / "qat", DATA),
        learn_scales=settings.learn_scales,
        parity_count=30,
    )
    losses = [epoch.loss for epoch in found.history.epochs]
    assert max(losses) < 1.2 * losses[0]
    assert losses[-1] < 0.6 * losses[0]
    scales = [
        numpy_helper.to_array(item) for item in found.model.graph.initializer if item.name.endswith("_scale")
    ]
    assert len(scales) > 6
    assert all((scale > 0).all() for scale in scales)


def test_what_was_trained_is_what_onnxruntime_runs(tuned: qat.Tuned) -> None:
    assert tuned.agreement.within_one_step >= 0.999
    assert tuned.agreement.images == 30
    tuned.agreement.check(0.999, "here")


def test_scales_change_and_nodes_do_not(full: ModelProto, tuned: qat.Tuned) -> None:
    before = quantize(full, INT4)
    assert [(node.op_type, node.name) for node in before.graph.node] == [
        (node.op_type, node.name) for node in tuned.model.graph.node
    ]
    old, new = initializers(before.graph), initializers(tuned.model.graph)
    moved = [
        name
        for name in old
        if not np.array_equal(numpy_helper.to_array(old[name]), numpy_helper.to_array(new[name]))
    ]
    assert any(name.endswith("_scale") for name in moved)
    assert any(name.endswith("_quantized") for name in moved)
    assert {tensor.data_type for tensor in old.values()} == {tensor.data_type for tensor in new.values()}


def test_a_fault_in_the_file_is_found(full: ModelProto, tuned: qat.Tuned) -> None:
    module = to_torch(tuned.model).module
    spoiled, _ = spoiled_bias(tuned.model, 0)
    batch = parity_images(DATA, (3, 8, 8), 30, 0)[0]
    found = measure_agreement(module, spoiled, batch, source="val images", threads=1, integers=False)
    assert found.within_one_step < 0.9
    with pytest.raises(ParityError, match=r"here: onnxruntime's logits are within one step .* val images"):
        found.check(0.999, "here")
    with pytest.raises(ParityError):
        replace(found, within_one_step=float("nan")).check(0.0, "here")


def spoiled_bias(model: ModelProto, which: int) -> tuple[ModelProto, str]:
    """A copy with a fault in one layer's bias, and the name of that layer's node."""
    spoiled = ModelProto()
    spoiled.CopyFrom(model)
    bias = [
        item for item in spoiled.graph.initializer if "bias_quantized" in item.name and item.data_type == 6
    ][which]
    array = numpy_helper.to_array(bias).copy()
    array[0] += 10 * np.abs(array).max()
    bias.CopyFrom(numpy_helper.from_array(array, bias.name))
    rounded = next(node.output[0] for node in spoiled.graph.node if bias.name in node.input)
    return spoiled, next(node.name for node in spoiled.graph.node if rounded in node.input)


def test_layer_by_layer_the_faulty_one_is_named(full: ModelProto) -> None:
    quantized = quantize(full, INT4)
    bridge, batch = to_torch(quantized), parity_images(DATA, (3, 8, 8), 30, 0)[0]
    good = measure_by_layer(bridge, quantized, batch, source="val images", threads=1)
    assert (good.within_one_step, good.top1_agreement, good.images) == (1.0, 1.0, 30)
    assert good.max_steps <= 1.001
    spoiled, layer = spoiled_bias(quantized, 0)
    found = measure_by_layer(bridge, spoiled, batch, source="val images", threads=1)
    # One channel of eight, and no other layer: each is given what the file computes before it.
    assert 0.85 < found.within_one_step < 0.95
    behind = next(node for node in spoiled.graph.node if node.name == found.worst)
    maker = next(node for node in spoiled.graph.node if behind.input[0] in node.output)
    assert maker.name == layer
    with pytest.raises(
        ParityError, match=f'given onnxruntime\'s values before it, "{found.worst}" is within'
    ):
        found.check(0.999, "here")


def test_one_quantizer_in_several_places_is_compared_in_each() -> None:
    pack = packs.get("onnxruntime-cpu")
    model = placed(padded_shortcut(), pack)
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim][1:]
    batch = np.random.default_rng(0).uniform(-2, 3, (9, *shape)).astype(np.float32)
    found = measure_by_layer(to_torch(model), model, batch, source="noise", threads=1)
    assert (found.within_one_step, found.images) == (1.0, 9)


def test_what_drifts_apart_end_to_end_is_compared_layer_by_layer(
    full: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qat, "measure_agreement", drifting)
    tuned = trained(full, tmp_path)
    assert tuned.agreement.by_layer
    assert tuned.agreement.within_one_step == 1.0


def drifting(*given: Any, **named: Any) -> Agreement:
    return replace(measure_agreement(*given, **named), within_one_step=0.998)


def trained(full: ModelProto, folder: Path) -> qat.Tuned:
    settings = QatSettings(epochs=1)
    return qat.fine_tune(
        quantize(full, INT4),
        full,
        DATA,
        settings,
        loss=Distillation(teacher=GraphTeacher(full, 1), method=settings.method, **settings.weights),
        ctx=make_context(folder, DATA),
        learn_scales=True,
        parity_count=30,
        min_agreement=0.999,
    )


def test_what_onnxruntime_does_not_compute_is_refused_before_it_is_trained(
    full: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qat, "measure_agreement", drifting)
    monkeypatch.setattr(
        qat,
        "measure_by_layer",
        lambda *given, **named: replace(measure_by_layer(*given, **named), within_one_step=0.998),
    )
    monkeypatch.setattr(qat, "fit", lambda *_given, **_named: pytest.fail("it was trained"))
    with pytest.raises(ParityError, match=r"before any training: .* 99.80% .* `min_agreement`"):
        trained(full, tmp_path)


def test_every_weight_bias_and_scale_gets_a_gradient(full: ModelProto) -> None:
    quantized = quantize(full, INT4)
    bridge = to_torch(quantized, float_weights=qat.starting_weights(find_layers(full, quantized)))
    bridge.learn_scales()
    batch = torch.from_numpy(parity_images(DATA, (3, 8, 8), 30, 0)[0])
    bridge.module(batch).square().sum().backward()
    parameters = dict(bridge.module.named_parameters())
    assert len(parameters) > 12
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_it_starts_from_what_the_graph_computes(full: ModelProto) -> None:
    quantized = quantize(full, INT4)
    layers = find_layers(full, quantized)
    starts = qat.starting_weights(layers)
    for layer in layers:
        scale = qat.along(layer.stored.scale, layer.stored.axis, layer.weight.ndim)
        np.testing.assert_array_equal(np.rint(starts[layer.stored.name] / scale), layer.stored.integers)
    batch = parity_images(DATA, (3, 8, 8), 30, 0)[0]
    module = to_torch(quantized, float_weights=starts).module
    found = measure_agreement(module, quantized, batch, source="", threads=1, integers=False)
    assert found.within_one_step == 1.0
    # Weights of another graph (equalized since, say) mean nothing; the integers do.
    for tensor in full.graph.initializer:
        assert tensor.name
    strangers = [replace(layer, weight=100 * layer.weight) for layer in layers]
    for layer in strangers:
        scale = qat.along(layer.stored.scale, layer.stored.axis, layer.weight.ndim)
        found_steps = qat.starting_weights([layer])[layer.stored.name] / scale
        np.testing.assert_array_equal(np.rint(found_steps), layer.stored.integers)


def test_an_interrupted_training_ends_with_the_same_file(
    full: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, settings = quantize(full, INT4), replace(QUICK, epochs=2)
    whole = tune(quantized, full, make_context(tmp_path / "whole", DATA), settings)
    ctx = make_context(tmp_path / "cut", DATA)
    original = loop._Training.one_epoch

    def cut(self: Any, progress: Any) -> None:
        if progress.epochs:
            raise KeyboardInterrupt
        original(self, progress)

    monkeypatch.setattr(loop._Training, "one_epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        tune(quantized, full, ctx, settings)
    monkeypatch.setattr(loop._Training, "one_epoch", original)
    again = tune(quantized, full, ctx, settings)
    assert again.model.SerializeToString(deterministic=True) == whole.model.SerializeToString(
        deterministic=True
    )


def test_seven_bits_stay_seven_bits(full: ModelProto, tmp_path: Path) -> None:
    quantized = quantize(full, NumberFormat(dtype="int8", symmetric=True, reduced=True))
    found = tune(quantized, full, make_context(tmp_path, DATA), replace(QUICK, lr=5e-2, epochs=2))
    largest = max(int(np.abs(layer.stored.integers).max()) for layer in find_layers(full, found.model))
    assert largest == 63
    assert not saturates_here(found.model)


@pytest.mark.parametrize("meant", [True, False])
def test_zeros_that_were_meant_stay(meant: bool, full: ModelProto, tmp_path: Path) -> None:
    sparse = ModelProto()
    sparse.CopyFrom(full)
    for tensor in sparse.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 4:
            mask = np.random.default_rng(0).random(values.shape) < 0.5
            tensor.CopyFrom(
                numpy_helper.from_array(np.where(mask, 0, values).astype(np.float32), tensor.name)
            )
    made_sparse = Artifact(
        key="s", format="torch", path=tmp_path, inputs=(), outputs=(), parents=(),
        facts=Facts(record={"sparsity": {"layers": ["conv"]}} if meant else {}),
    )  # fmt: skip
    ctx = replace(make_context(tmp_path, DATA), lineage=(made_sparse,))
    quantized, settings = quantize(sparse, INT8), replace(QUICK, epochs=3, lr=0.1)
    options: dict[str, Any] = {"learn_scales": False, "parity_count": 10}
    found = qat.fine_tune(quantized, sparse, DATA, settings, loss=CrossEntropy(), ctx=ctx, **options)
    stored = {layer.node.name: layer.stored.integers for layer in find_layers(sparse, found.model)}
    moved = {True: 0, False: 0}
    for layer in find_layers(sparse, quantized):
        zero, changed = layer.weight == 0, stored[layer.node.name] != layer.stored.integers
        moved[True] += int(changed[zero].sum())
        moved[False] += int(changed[~zero].sum())
    assert moved[False] > 50
    assert (moved[True] == 0) == meant


def test_packed_weights_stay_packed(full: ModelProto, tmp_path: Path) -> None:
    quantized = quantize(full, INT4)
    widen(quantized)
    found = tune(quantized, full, make_context(tmp_path, DATA), replace(QUICK, epochs=1))
    assert [node.op_type for node in found.model.graph.node].count("Cast") == 3
    assert found.agreement.within_one_step >= 0.999


class OptionA(nn.Module):
    """A shortcut without weights, which CPU targets make a convolution of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.shortcut, self.head = PadShortcut(8, 4, 4, stride=2), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.conv(x) + self.shortcut(x)).mean((2, 3)))


def test_shortcuts_without_weights_are_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = to_graph(randomized(OptionA()))
    held: dict[str, bool] = {}

    def watch(model: nn.Module, *rest: Any, **named: Any) -> History:
        held.update((name, parameter.requires_grad) for name, parameter in model.named_parameters())
        return loop.fit(model, *rest, **named)

    monkeypatch.setattr(qat, "fit", watch)
    quantized = quantize(full, INT8)
    found = tune(quantized, full, make_context(tmp_path, DATA), replace(QUICK, weight_decay=0.1, epochs=3))
    assert {name.split(".")[1] for name, trained in held.items() if not trained} == {"shortcut_Pad_selected"}
    before, after = (initializers(made.graph) for made in (quantized, found.model))
    changed = {name for name in before if before[name] != after[name]}
    assert {"stem.weight_quantized", "conv.weight_quantized", "conv.weight_scale"} < changed
    assert not any(name.startswith("shortcut") for name in changed)
    assert found.agreement.within_one_step >= 0.99


class Joined(nn.Module):
    """Two convolutions whose outputs a third reads as one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = self.last(torch.cat((torch.relu(self.left(x)), torch.relu(self.right(x))), dim=1))
        return torch.relu(joined).mean([2, 3])


def test_tied_scales_stay_tied() -> None:
    full = prepare(export_onnx(randomized(Joined()), (3, 8, 8), opset=18, classes=None))
    plan = place(full, replace(packs.get("onnxruntime-cpu"), tie_concat=True))
    quantized = build(full, plan, dict.fromkeys(ranges_needed(plan), (-3.0, 3.0)))
    bridge = to_torch(quantized)
    bridge.learn_scales()
    optimizer = torch.optim.SGD(bridge.module.parameters(), lr=1e-4)
    bridge.module(torch.from_numpy(images(4, (3, 8, 8)))).square().sum().backward()
    optimizer.step()
    batch = images(8, (3, 8, 8), seed=3)
    written = bridge.write_back()
    found = measure_agreement(bridge.module, written, batch, source="", threads=1, integers=False)
    assert found.within_one_step >= 0.99


def test_a_training_that_helps_nothing_is_undone(
    full: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(model: nn.Module, *_: Any, **__: Any) -> History:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        return History(
            epochs=(), initial_val_top1=0.9, kept_epoch=1, kept_val_top1=0.8, stopped="finished", precision="fp32",
            device="cpu",
        )  # fmt: skip

    monkeypatch.setattr(qat, "fit", worse)
    quantized = quantize(full, INT4)
    found = tune(quantized, full, make_context(tmp_path, DATA), replace(QUICK, keep="best"))
    assert not found.kept
    assert found.model.SerializeToString(deterministic=True) == quantized.SerializeToString(
        deterministic=True
    )
    assert found.agreement.within_one_step >= 0.999


def test_a_scale_that_becomes_useless_is_told(
    full: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_scale(model: nn.Module, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            next(item for name, item in model.named_parameters() if "scale" in name).fill_(torch.nan)

    monkeypatch.setattr(qat, "fit", break_scale)
    with pytest.raises(TrainingError, match="lower `lr`"):
        tune(quantize(full, INT4), full, make_context(tmp_path, DATA))


def test_batch_norms_keep_their_statistics() -> None:
    frozen = qat.Frozen(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    frozen.train()
    conv, norm, drop = frozen.module
    assert (conv.training, norm.training, drop.training) == (True, False, True)


def test_a_float_graph_is_refused(full: ModelProto, tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match="put it behind int8"):
        tune(full, full, make_context(tmp_path, DATA))
