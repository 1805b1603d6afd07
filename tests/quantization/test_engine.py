from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import infer_shapes, is_quantized
from deploycnn.graph.parity import evaluator
from deploycnn.quantization import engine as engines
from deploycnn.quantization import packs
from deploycnn.quantization import quantize as quantizing
from deploycnn.quantization.channels import channel_groups
from deploycnn.quantization.engine import Candidate, Engine
from deploycnn.quantization.equalization import rescale
from deploycnn.quantization.job import layer_macs
from deploycnn.quantization.judge import EXACT_DB, Judge
from deploycnn.quantization.layers import layer_table, value_sqnr
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.quantize import FEW_FLOAT_LAYERS, FLOAT_LAYERS, Options, Quantizer
from deploycnn.quantization.remedies import choose, first_images, remedies
from deploycnn.quantization.sensitivity import Mixed, Sensitivity, share_given_up
from tests.graph.nets import Residual, images, randomized

SHAPE = (3, 12, 12)


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return prepare(export_onnx(randomized(Residual()), SHAPE, opset=18, classes=None))


def calibration():
    return [images(8, SHAPE, seed=seed) for seed in range(2)]


def labelled(model: ModelProto):
    """Images with the float model's own predictions as classes, so that its top-1 is 1."""
    held = []
    for seed in range(4):
        content = images(16, SHAPE, seed=10 + seed)
        held.append((content, evaluator(model)(content)[0].argmax(axis=1).astype(np.int64)))
    return lambda: iter(held)


def make(target: str = "onnxruntime-cpu") -> Engine:
    return Engine(packs.get(target), calibration)


def test_one_calibration_serves_candidates_of_one_graph(model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def counted(*args, **kwargs):
        runs.append(kwargs["values"])
        return engines_calibrate(*args, **kwargs)

    engines_calibrate = engines.calibrate
    monkeypatch.setattr(engines, "calibrate", counted)
    engine = make()
    start = Candidate(model=model, calibrator="minmax")
    first = engine.build(start)
    assert len(runs) == 1
    engine.build(replace(start, calibrator="mse"))
    assert len(runs) == 1
    # With a layer in float other values are rounded: only these are looked at.
    layers = engine.layers(start)
    engine.look_ahead(start, [{layer} for layer in layers])
    seen = len(runs)
    for layer in layers:
        engine.build(replace(start, keep_float=frozenset({layer})))
    assert len(runs) == seen
    assert not set(runs[0]) & {name for later in runs[1:] for name in later}
    other = ModelProto()
    other.CopyFrom(model)
    assert is_quantized(engine.build(replace(start, model=other)))
    assert runs[-1] == runs[0]
    assert is_quantized(first)


def test_mean_maps_are_summed_up_in_the_same_pass(model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    engines_calibrate = engines.calibrate

    def counted(*args, **kwargs):
        passes.append(kwargs["means"])
        return engines_calibrate(*args, **kwargs)

    monkeypatch.setattr(engines, "calibrate", counted)
    start = Candidate(model=model, calibrator="minmax")
    shifts = {}
    for together in (True, False):
        passes.clear()
        engine = Engine(packs.get("onnxruntime-cpu"), calibration, mean_maps=together)
        engine.build(start)
        shifts[together] = remedies(engine, seed=0, tell=lambda *_: None)["correct_bias"](start).shifts
        assert [bool(means) for means in passes] == ([True] if together else [False, True])
    for name, shift in shifts[True].items():
        np.testing.assert_allclose(shift, shifts[False][name], rtol=1e-5, atol=1e-7)


def test_ranges_are_searched_once(model: ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    choose_ranges = engines.choose_ranges

    def counted(*args):
        searches.append(args[2])
        return choose_ranges(*args)

    monkeypatch.setattr(engines, "choose_ranges", counted)
    engine = make()
    start = Candidate(model=model, calibrator="minmax")
    for name in ("minmax", "mse", "minmax", "mse"):
        engine.build(replace(start, calibrator=name))
    assert searches == ["minmax", "mse"]
    layers = engine.layers(start)
    mixed = replace(start, keep_float=frozenset(layers[:1]))
    assert engine.ranges(mixed).keys() < engine.ranges(start).keys()


def test_remedies_stay_only_where_they_help(model: ModelProto) -> None:
    """A harmful one is undone, one that is not needed is not tried, a needed one is found."""
    channels = [(group, 64.0 ** np.linspace(-1, 1, group.channels)) for group in channel_groups(model)]
    stressed = ModelProto()
    stressed.CopyFrom(model)
    rescale(stressed, channels)
    levels, tried = {}, {}
    for name, graph in (("plain", model), ("stressed", infer_shapes(stressed))):
        # Such a percentile cuts off most of the values.
        engine = Engine(packs.get("onnxruntime-cpu"), calibration, percentile=60.0)
        judge = Judge(graph, labelled(graph), integers=False)
        known = remedies(engine, seed=0, tell=lambda *_: None)
        options = Options(
            calibrator="minmax",
            remedies=("percentile", "equalize", "correct_bias"),
            if_better={"percentile": np.inf, "equalize": 20.0, "correct_bias": np.inf},
        )
        quantizer = Quantizer(graph, engine, quick_judge=judge, remedies=known)
        found = quantizer.run(options)
        assert found.judgement is None
        assert found.candidate.calibrator == "minmax"
        levels[name] = judge(found.model).sqnr_db
        tried[name] = {step.rung: step.kept for step in found.compared}
    assert list(tried["plain"]) == ["minmax", "percentile", "correct_bias"]
    assert not tried["plain"]["percentile"]
    assert tried["stressed"]["equalize"]
    assert levels["stressed"] > levels["plain"] - 3


def test_nothing_quantized_is_the_float_graph(model: ModelProto) -> None:
    engine = make()
    start = Candidate(model=model, calibrator="minmax")
    found = engine.build(replace(start, keep_float=frozenset(engine.layers(start))))
    assert not is_quantized(found)


def test_a_finished_graph_is_taken_as_it_is(model: ModelProto) -> None:
    assert make().build(Candidate(model=model, calibrator="minmax", graph=model)) is model


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt"])
def test_layers_in_float_bring_the_model_within_the_budget(model: ModelProto, target: str) -> None:
    engine = make(target)
    judge = Judge(model, labelled(model), integers=False)
    assert judge.top1 == 1.0
    quantizer = Quantizer(model, engine, judge=judge, macs=layer_macs(model))
    free = quantizer.run(Options(calibrator="minmax", ladder=(FLOAT_LAYERS,), max_top1_drop=1.0))
    assert free.met
    assert not free.accuracy_float
    assert not free.sensitivities
    strict = quantizer.run(Options(calibrator="minmax", ladder=(FLOAT_LAYERS,), max_top1_drop=0.0))
    assert strict.met
    assert strict.judgement is not None
    assert strict.judgement.top1_drop is not None
    assert strict.judgement.top1_drop <= 0.0
    assert judge(strict.model) == strict.judgement
    assert {layer.node for layer in strict.sensitivities} >= strict.accuracy_float


def test_an_excluded_node_stays_float_all_the_way(model: ModelProto) -> None:
    engine = make()
    layers = engine.layers(Candidate(model=model, calibrator="minmax"))
    judge = Judge(model, labelled(model), integers=False)
    found = Quantizer(model, engine, judge=judge, remedies={"mse": choose("mse")}).run(
        Options(calibrator="minmax", exclude=layers[:1], ladder=("mse",), max_top1_drop=0.0)
    )
    assert layers[0] in engine.plan(found.candidate).kept_float
    assert next(step.rung for step in found.tried) == "minmax"


def test_the_table_tells_of_every_layer(model: ModelProto) -> None:
    engine = make()
    start = Candidate(model=model, calibrator="minmax")
    layers = engine.layers(start)
    candidate = replace(start, keep_float=frozenset({layers[1]}))
    plan, ranges = engine.plan(candidate), engine.ranges(candidate)
    quantized = engine.build(candidate)
    noise = value_sqnr(model, quantized, list(ranges), [images(10, SHAPE, seed=3)])
    assert set(noise) == set(ranges)
    assert all(5 < level < 70 for level in noise.values())
    rows = layer_table(
        model, kept_float=plan.kept_float, ranges=ranges, sqnr_db=noise, fused={layers[0]: True},
        macs=layer_macs(model), int8_ms={layers[0]: 0.5}, float_ms={}, precisions={layers[0]: "w4a8"},
    )  # fmt: skip
    assert [row.node for row in rows] == list(layers)
    assert [row.precision for row in rows] == ["w4a8", "float", "int8"]
    assert rows[1].why == "as asked"
    assert (rows[0].fused, rows[0].int8_ms, rows[0].float_ms) == (True, 0.5, None)
    # The stem's ReLU is folded: what leaves is not negative.
    assert rows[0].range is not None
    assert rows[0].range[0] == 0.0
    assert rows[0].macs == 12 * 12 * 8 * 3 * 9


def test_noise_of_a_value_is_that_of_numpy(model: ModelProto) -> None:
    engine = make()
    candidate = Candidate(model=model, calibrator="minmax")
    quantized = engine.build(candidate)
    batch = images(4, SHAPE, seed=5)
    name = model.graph.input[0].name
    plan = engine.plan(candidate)
    low, high = engine.ranges(candidate)[name]
    scale, zero = plan.activation.scale_and_zero_point((low, high))
    rounded = (np.clip(np.rint(batch / scale) + zero, 0, 255) - zero) * np.float64(scale)
    expected = 10 * np.log10(np.square(batch, dtype=np.float64).sum() / np.square(batch - rounded).sum())
    assert value_sqnr(model, quantized, [name], [batch])[name] == pytest.approx(expected, abs=1e-4)
    assert value_sqnr(model, model, [name], [batch])[name] == EXACT_DB
    assert value_sqnr(model, quantized, ["no such value"], [batch]) == {}


def test_every_remedy_gives_a_graph_that_computes_nearly_the_same(model: ModelProto) -> None:
    engine = make()
    judge = Judge(model, labelled(model), integers=False)
    known = remedies(engine, seed=0, tell=lambda *_: None)
    assert list(known) == ["percentile", "mse", "equalize", "absorb_bias", "correct_bias", "adaround"]
    plain = Candidate(model=model, calibrator="minmax")
    before = judge(engine.build(plain)).sqnr_db
    for name in ("percentile", "mse", "equalize", "correct_bias", "adaround"):
        after = known[name](plain)
        assert judge(engine.build(after)).sqnr_db > before - 3.0, name
    # One upon the other, as on the ladder.
    best = plain
    for name in ("mse", "equalize", "correct_bias", "adaround"):
        best = known[name](best)
    assert set(best.weights) == {item.initializer for item in engine.plan(best).weights}
    assert judge(engine.build(best)).sqnr_db > before - 3.0


def test_equal_seeds_round_equally(model: ModelProto) -> None:
    known = remedies(make(), seed=3, tell=lambda *_: None)
    plain = Candidate(model=model, calibrator="minmax")
    first, second = (known["adaround"](plain).weights for _ in range(2))
    assert all((first[name].integers == second[name].integers).all() for name in first)


def test_the_first_images_are_those_of_the_calibration() -> None:
    found = first_images(make(), 11)
    assert (found == np.concatenate(calibration())[:11]).all()
    assert len(first_images(make(), 1000)) == 16


def bias_of(model: ModelProto, node: str) -> tuple[np.ndarray, np.ndarray | float]:
    """A layer's bias in real numbers, and the step of the integers that it is stored in."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {name: other for other in model.graph.node for name in other.output}
    name = next(other for other in model.graph.node if other.name == node).input[2]
    if name in constants:
        return constants[name].astype(np.float64), 0.0
    integers, scale = (constants[item] for item in made_by[name].input[:2])
    return integers * scale.astype(np.float64), scale.astype(np.float64)


def test_corrected_biases_are_those_of_quantized_layers_only(model: ModelProto) -> None:
    engine = Engine(packs.four_bits(packs.get("onnxruntime-cpu")), calibration)
    known = remedies(engine, seed=0, tell=lambda *_: None)
    plain = Candidate(model=model, calibrator="minmax")
    corrected = known["correct_bias"](plain)
    layers = engine.layers(plain)
    assert set(corrected.shifts) == set(layers)
    full = engine.build(corrected)
    moved = 0
    for layer in layers:
        shift = corrected.shifts[layer]
        found, step = bias_of(full, layer)
        assert (np.abs(found - (bias_of(model, layer)[0] - shift)) <= 0.501 * step).all()
        moved += int((np.abs(shift) > step).sum())
    assert moved > 5, "more than the rounding of biases is told apart"
    # A layer in float makes no rounding error, so nothing of it may be taken away.
    mixed = engine.build(replace(corrected, keep_float=frozenset(layers[:1])))
    np.testing.assert_array_equal(bias_of(mixed, layers[0])[0], bias_of(model, layers[0])[0])
    everything = engine.build(replace(corrected, keep_float=frozenset(layers)))
    assert everything.SerializeToString() == model.SerializeToString()


def test_what_is_learned_or_rescaled_anew_drops_older_corrections(model: ModelProto) -> None:
    known = remedies(make(), seed=0, tell=lambda *_: None)
    corrected = known["correct_bias"](Candidate(model=model, calibrator="minmax"))
    plain = known["adaround"](replace(corrected, shifts={}))
    learned = known["adaround"](corrected)
    assert not learned.shifts
    assert all(
        (learned.weights[name].integers == plain.weights[name].integers).all() for name in plain.weights
    )
    assert not known["equalize"](corrected).shifts
    again = known["correct_bias"](learned)
    assert again.weights is learned.weights
    assert any((again.shifts[name] != corrected.shifts[name]).any() for name in corrected.shifts)


def test_more_than_a_few_layers_in_float_are_the_last_resort(
    model: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    judge = Judge(model, labelled(model), integers=False)
    layers = frozenset(engine.layers(Candidate(model=model, calibrator="minmax")))
    gains = dict(zip(sorted(layers), (6.0, 3.0, 1.0), strict=True))
    searches = []

    def everything(*_args: object, **_options: object) -> Mixed:
        searches.append(1)
        return Mixed(keep_float=layers, judgement=judge(model), met=True, trials=1)

    monkeypatch.setattr(quantizing, "keep_within", everything)

    def nothing(_best: Candidate) -> Candidate:
        raise PassRequirementError("no training here")

    # The first judgement, of the integer graph, is beyond any budget.
    quantizer = Quantizer(
        model,
        engine,
        judge=judge,
        remedies={"qat": nothing},
        gains_ms=lambda _: gains,
        macs=layer_macs(model),
    )
    found = quantizer.run(
        Options(calibrator="minmax", ladder=(FEW_FLOAT_LAYERS, "qat", FLOAT_LAYERS), max_top1_drop=-1e-9)
    )
    rungs = {step.rung: step for step in found.tried}
    assert list(rungs) == ["minmax", FEW_FLOAT_LAYERS, "qat", FLOAT_LAYERS]
    assert "3 of 3 layers would stay float, which gives up 100%" in rungs[FEW_FLOAT_LAYERS].why
    assert rungs["qat"].why == "no training here"
    assert rungs[FLOAT_LAYERS].kept
    assert found.accuracy_float == layers
    assert len(searches) == 1, "the sets are searched once"


@pytest.mark.parametrize(
    ("gains", "share"), [({"a": 3.0, "b": 1.0}, 0.75), ({"a": -3.0, "b": 1.0}, 0.0), ({}, 0.25)]
)
def test_what_float_layers_give_up_is_a_share_of_what_integers_save(gains, share: float) -> None:
    layers = [
        Sensitivity(node=name, sqnr_db=20.0, top1_drop=0.0, gain_ms=gains.get(name), macs=macs)
        for name, macs in (("a", 10), ("b", 30))
    ]
    assert share_given_up({"a"}, layers) == pytest.approx(share)
    assert share_given_up({"a", "b"}, layers) == pytest.approx(1.0)
    assert share_given_up((), layers) == 0
