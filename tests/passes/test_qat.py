from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploycnn import registry, schema
from deploycnn.core import Artifact, Context, Facts, TensorSpec
from deploycnn.data.augment import Augmentation
from deploycnn.errors import ParityError, PassRequirementError, PreprocessingError, RecipeError
from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import is_quantized, load_onnx, save_onnx
from deploycnn.graph.parity import evaluator
from deploycnn.graph.probe import parity_images
from deploycnn.passes.int8 import Int8
from deploycnn.passes.qat import Qat
from deploycnn.quantization import isa, packs
from deploycnn.quantization import qat as quantization_qat
from deploycnn.quantization.preparation import prepare
from deploycnn.training.losses import Distillation
from tests.graph.nets import Residual, randomized
from tests.passes.training_support import DATA as TORCH_DATA
from tests.passes.training_support import as_artifact, make_artifact
from tests.training.support import CLASSES, make_context, make_data

DATA = make_data()
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 5e-3, "augment": Augmentation(crop_padding=1)}


def onnx_artifact(path: Path, precision: str, *, preprocessing: Any = None) -> Artifact:
    return Artifact(
        key=precision,
        format="onnx",
        path=path,
        inputs=(TensorSpec(name="images", dtype="float32", shape=(None, 3, 8, 8)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, 3)),),
        parents=(),
        facts=Facts(params=1, preprocessing=preprocessing, classes=CLASSES, precision=precision),
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """A float ONNX artifact and its INT8 twin, as export and int8 leave them."""
    folder = tmp_path_factory.mktemp("chain")
    model = export_onnx(randomized(Residual(classes=3)), (3, 8, 8), opset=18, classes=list(CLASSES))
    save_onnx(model, folder / "float.onnx")
    full = onnx_artifact(folder / "float.onnx", "fp32", preprocessing=DATA.preprocessing.to_json())
    ctx = make_context(folder / "int8", DATA)
    draft = Int8(calibration_images=30, reduce_range=True).run(full, ctx)
    quantized = as_artifact(draft, ctx.output)
    return full, replace(quantized, path=ctx.output / "model.onnx")


def context(folder: Path, chain: tuple[Artifact, Artifact], **options: Any) -> Context:
    return make_context(folder, DATA, lineage=chain, **options)


def test_a_file_made_for_another_kind_of_cpu_is_trained_here(
    tmp_path: Path, chain: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    full, _ = chain
    ctx = make_context(tmp_path / "int8", DATA)
    with monkeypatch.context() as patch:
        patch.setattr(isa, "detect_isa", lambda: isa.Isa(name="aarch64", saturates=False))
        draft = Int8(calibration_images=30, do_no_harm=False).run(full, ctx)
    assert "align_first_layers" not in draft.facts.record["int8"]["rewrites"]
    quantized = replace(as_artifact(draft, ctx.output), path=ctx.output / "model.onnx")
    record = Qat(**QUICK).run(quantized, context(tmp_path / "qat", (full, quantized))).facts.record
    assert record["qat"]["agreement"]["images"] > 0


def test_it_trains_the_deployed_graph_with_the_float_graph_as_teacher(
    tmp_path: Path, chain: tuple[Artifact, Artifact]
) -> None:
    ctx = context(tmp_path, chain)
    step = Qat(**QUICK)
    step.requires(chain[1])
    draft = step.run(chain[1], ctx)
    before, after = load_onnx(chain[1].path), load_onnx(ctx.output / "model.onnx")
    assert is_quantized(after)
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    assert after.SerializeToString() != before.SerializeToString()
    assert [item.key for item in after.metadata_props] == [item.key for item in before.metadata_props]
    record = draft.facts.record
    assert draft.facts.precision == "int8"
    assert len(record["training"]["epochs"]) == 2
    assert record["teacher"]["name"] == "the float model"
    assert record["qat"]["agreement"]["within_one_step"] >= 0.999
    assert record["qat"]["agreement"]["integers"]
    assert record["int8"]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("as_module", [False, True])
def test_the_float_teacher_is_the_float_graph(
    tmp_path: Path, chain: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch, as_module: bool
) -> None:
    from deploycnn.training import teacher as teachers

    if as_module:  # as where onnxruntime is not installed
        monkeypatch.setattr(teachers, "installed", lambda _name: False)
    batch = parity_images(DATA, (3, 8, 8), 10, 0)[0]
    teacher = teachers.graph_teacher(load_onnx(chain[0].path), context(tmp_path, chain))
    assert isinstance(teacher, teachers.GraphTeacher) != as_module
    with torch.inference_mode():
        found = teacher(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(found, evaluator(chain[0].path)(batch)[0], atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_another_variant_may_teach(tmp_path: Path) -> None:
    teacher = make_artifact(tmp_path / "teacher")
    step = Qat(teacher="big", **QUICK)
    assert step.references() == ("big",)
    ctx = make_context(tmp_path / "run", TORCH_DATA, references={"big": teacher})
    module, name = step._teacher(ctx)
    assert name == "big"
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_without_a_float_ancestor_it_is_refused(tmp_path: Path, chain: tuple[Artifact, Artifact]) -> None:
    with pytest.raises(PassRequirementError, match="no float ONNX model stands before it"):
        Qat(**QUICK).run(chain[1], context(tmp_path, (chain[1],) * 2))


def test_a_float_model_is_refused(chain: tuple[Artifact, Artifact]) -> None:
    with pytest.raises(PassRequirementError, match="the model is fp32, not quantized"):
        Qat().requires(chain[0])


def test_other_preprocessing_is_refused(tmp_path: Path, chain: tuple[Artifact, Artifact]) -> None:
    other = replace(DATA.preprocessing, scale="signed").to_json()
    source = replace(chain[1], facts=replace(chain[1].facts, preprocessing=other))
    with pytest.raises(PreprocessingError, match="qat"):
        Qat(**QUICK).run(source, context(tmp_path, chain))


def test_disagreement_with_onnxruntime_is_an_error_and_nothing_is_written(
    tmp_path: Path, chain: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploycnn.quantization import qat

    for name in ("measure_agreement", "measure_by_layer"):
        measured = getattr(qat, name)

        def poor(*arguments: Any, measured: Any = measured, **options: Any) -> Any:
            return replace(measured(*arguments, **options), within_one_step=0.5)

        monkeypatch.setattr(qat, name, poor)
    ctx = context(tmp_path, chain)
    with pytest.raises(ParityError, match=r"50\.00% of values"):
        Qat(**{**QUICK, "epochs": 0}).run(chain[1], ctx)
    assert not list(ctx.output.iterdir())


def test_no_epochs_leave_the_integers_as_they_are(tmp_path: Path, chain: tuple[Artifact, Artifact]) -> None:
    ctx = context(tmp_path, chain)
    draft = Qat(**{**QUICK, "epochs": 0}).run(chain[1], ctx)
    before, after = load_onnx(chain[1].path), load_onnx(ctx.output / "model.onnx")
    batch = parity_images(DATA, (3, 8, 8), 20, 0)[0]
    np.testing.assert_array_equal(evaluator(before)(batch)[0], evaluator(after)(batch)[0])
    assert draft.facts.record["training"]["epochs"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw"}, "learn_scales needs optimizer sgd"),
        ({"temperature": 0}, "temperature"),
        ({"min_agreement": 2}, "min_agreement"),
        ({"teachers": "a"}, 'did you mean "teacher"'),
    ],
)
def test_recipes_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.build(Qat, options, "variants.qat.2.qat")
    assert message in str(caught.value)


def test_it_is_registered_and_described() -> None:
    assert registry.get("pass", "qat") is Qat
    assert all(help_ for _, _, _, help_ in schema.describe(Qat))
    assert Qat(optimizer="adamw", learn_scales=False).peak_lr == 1e-4
    assert (Qat().epochs, Qat().trains) == (2, True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("kd", 4.0, 1.0, 0.0, 0.0)),
        ({"method": "dkd", "beta": 3.0, "label_weight": 0.5}, ("dkd", 4.0, 1.0, 3.0, 0.5)),
        ({"method": "dist"}, ("dist", 1.0, 1.0, 1.0, 0.0)),
    ],
)
def test_the_teachers_term_is_that_of_distill(
    tmp_path: Path,
    chain: tuple[Artifact, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    expected: tuple[Any, ...],
) -> None:
    seen: list[Distillation] = []

    def fine_tune(*_: Any, loss: Distillation, **__: Any) -> None:
        seen.append(loss)
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization_qat, "fine_tune", fine_tune)
    with pytest.raises(KeyboardInterrupt):
        Qat(**QUICK, **options).run(chain[1], context(tmp_path, chain))
    (loss,) = seen
    assert (loss.method, loss.temperature, loss.alpha, loss.beta, loss.label_weight) == expected


def test_beta_with_kd_is_refused() -> None:
    with pytest.raises(RecipeError, match="beta belongs to dkd and dist"):
        schema.build(Qat, {"beta": 1.0}, "qat")


def test_averages_and_mixed_images_end_in_a_graph_that_agrees(
    tmp_path: Path, chain: tuple[Artifact, Artifact]
) -> None:
    draft = Qat(**QUICK, method="dist", ema=0.9, mixup=0.4).run(chain[1], context(tmp_path, chain))
    assert draft.facts.record["qat"]["agreement"]["within_one_step"] >= 0.999


class Grouped(nn.Module):
    """A grouped convolution, which the CPU's rules widen, behind a HardSwish, which they rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 3)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.hardswish(self.stem(images_NCHW))
        logits_NK: torch.Tensor = self.head(torch.relu(self.conv(hidden)).mean((2, 3)))
        return logits_NK


def test_what_int8_rewrote_is_trained_from_the_rewritten_float_weights(tmp_path: Path) -> None:
    model = export_onnx(randomized(Grouped()), (3, 8, 8), opset=18, classes=list(CLASSES))
    save_onnx(model, tmp_path / "float.onnx")
    full = onnx_artifact(tmp_path / "float.onnx", "fp32", preprocessing=DATA.preprocessing.to_json())
    ctx = make_context(tmp_path / "int8", DATA, target="onnxruntime-cpu")
    quantized = as_artifact(Int8(calibration_images=30, reduce_range=True).run(full, ctx), ctx.output)
    quantized = replace(quantized, path=ctx.output / "model.onnx")
    stored = {t.name: list(t.dims) for t in load_onnx(quantized.path).graph.initializer}
    assert [16, 16, 3, 3] in stored.values(), "groups of 4 channels became one of 16"
    draft = Qat(**QUICK).run(quantized, context(tmp_path / "qat", (full, quantized)))
    assert draft.facts.record["qat"]["agreement"]["within_one_step"] >= 0.999
    rewritten = prepare(load_onnx(full.path), packs.get("onnxruntime-cpu"))
    layers = quantization_qat.find_layers(rewritten, load_onnx(quantized.path))
    starts = quantization_qat.starting_weights(layers)
    for layer in layers:
        assert layer.weight.shape == layer.stored.integers.shape
        # Nearly all weights begin where float had them, and none further than half a step away.
        off = np.abs(starts[layer.stored.name] - layer.weight)
        assert np.median(off) < 1e-6
    plain = quantization_qat.find_layers(prepare(load_onnx(full.path)), load_onnx(quantized.path))
    assert any(layer.weight.shape != layer.stored.integers.shape for layer in plain), "the rules matter"
    assert quantization_qat.starting_weights(plain).keys() == starts.keys()


def test_where_int8_shipped_float_the_reason_is_told(chain: tuple[Artifact, Artifact]) -> None:
    record = {"int8": {"do_no_harm": "no INT8 graph is faster than float"}}
    source = replace(chain[0], facts=replace(chain[0].facts, record=record))
    with pytest.raises(PassRequirementError, match=r"int8 left all of it float \(no INT8 graph is faster"):
        Qat().requires(source)
