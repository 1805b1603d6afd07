"""The audit: asked for against got, by hand-made layers whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploycnn.engines import audit, layers
from deploycnn.engines.audit import Asked, Threshold
from deploycnn.engines.layers import Layer, Tensor
from deploycnn.errors import RecipeError
from tests.engines import graphs
from tests.engines.test_layers import SAMPLES, sample


def layer(name: str, precision: str, *nodes: str, kind: str = "correlation") -> Layer:
    values = (Tensor(name="x", precision=precision, format="NHWC", shape=(1, 8)),)
    return Layer(name=name, kind=kind, inputs=values, constants=values, onnx_nodes=nodes)


ASKED = [
    Asked(node="a", operator="Conv", precision="int8", macs=700),
    Asked(node="b", operator="Conv", precision="int8", macs=200),
    Asked(node="c", operator="Gemm", precision="fp16", macs=100),
]
LAYERS = [
    Layer(name="Reformatting CopyNode for Input 0", kind="Reformat"),
    layer("a + relu", "int8", "a", "relu"),
    layer("b", "fp32", "b"),
    layer("c", "fp16", "c", kind="gemm"),
]


def test_shares_are_of_macs_and_differences_are_found() -> None:
    result = audit.audit(LAYERS, ASKED)
    assert result.shares == {"int8": 0.7, "fp32": 0.2, "fp16": 0.1}
    assert result.as_asked == pytest.approx(0.8)
    assert [row.name for row in result.rows if row.differs] == ["b"]
    assert [row.name for row in result.reformats] == ["Reformatting CopyNode for Input 0"]
    assert result.census() == (
        "70% of MACs ran INT8, 20% FP32, 10% FP16; 1 layer not in the precision that the graph asked for; 1 reformat"
    )


def test_times_make_the_census_tell_what_reformats_cost() -> None:
    times = {"Reformatting CopyNode for Input 0": 0.04, "a + relu": 0.5, "b": 0.25}
    result = audit.audit(LAYERS, ASKED, times)
    assert result.census().endswith("1 reformat cost 0.04 ms")
    assert result.metrics()["time_ms"] == pytest.approx(0.79)
    assert result.metrics()["reformat_ms"] == pytest.approx(0.04)
    assert "time_ms" not in audit.audit(LAYERS, ASKED).metrics()


def test_a_nameless_product_is_known_by_its_place() -> None:
    """A convolution of a single pixel becomes "__myl_FcAdd_myl0_52", without metadata."""
    nameless = layer("__myl_FcAdd_myl0_1", "fp16", kind="runtime_fusion")
    result = audit.audit([LAYERS[1], nameless, LAYERS[3]], ASKED)
    assert not result.unmatched
    assert [row.macs for row in result.rows] == [700, 200, 100]
    assert [row.name for row in result.rows if row.differs] == ["__myl_FcAdd_myl0_1"]


@pytest.mark.parametrize(
    "around",
    [
        [layer("a", "int8", "a"), layer("c", "fp16", "c"), layer("__myl_Fc_myl0_1", "fp16")],  # elsewhere
        [layer("a", "int8", "a"), layer("__myl_Mean_myl0_1", "fp16", kind="kgen"), layer("c", "fp16", "c")],
        [
            layer("a", "int8", "a"),
            layer("__myl_Fc_myl0_1", "fp16"),
            layer("__myl_Fc_myl0_2", "fp16"),
            layer("c", "fp16", "c"),
        ],
    ],
)
def test_nothing_is_guessed_where_the_place_leaves_a_choice(around: list[Layer]) -> None:
    assert audit.audit(around, ASKED).unmatched == ("b",)


def test_macs_go_to_the_layer_that_multiplies() -> None:
    """A node's name also stands on kernels that prepare its input or scale its output."""
    around = [
        layer("__myl_MulRounCast_myl0_1", "fp32", "a", kind="kgen"),
        layer("a_myl0_2", "int8", "a"),
        layer("__myl_MulAdd_myl0_3", "fp32", "a", kind="kgen"),
    ]
    result = audit.audit(around, ASKED[:1])
    assert [row.macs for row in result.rows] == [0, 700, 0]


def test_a_node_that_no_layer_names_is_told() -> None:
    result = audit.audit(LAYERS[:2], ASKED)
    assert result.unmatched == ("b", "c")
    assert result.metrics()["unmatched"] == 2


def test_no_layer_is_shown_as_all_where_a_little_ran_otherwise() -> None:
    asked = [Asked(node="a", operator="Conv", precision="int8", macs=9999)]
    asked.append(Asked(node="b", operator="Conv", precision="fp32", macs=1))
    assert audit.audit(LAYERS, asked).census().startswith("100.0% of MACs ran INT8, 0.0% FP32")


def test_tf32_is_what_float32_asked_for_where_it_is_allowed() -> None:
    fc = layers.parse(sample("tensorrt-10-documented"))[-1]
    result = audit.audit([fc], [Asked(node="fc", operator="MatMul", precision="fp32", macs=5)])
    assert result.shares == {"tf32": 1.0}
    assert not result.rows[0].differs


def test_the_recorded_engine() -> None:
    kept = json.loads((SAMPLES / "rtx-1.7-lenet5-int8.json").read_text())
    result = audit.audit(layers.parse(kept["information"]), [Asked(**item) for item in kept["asked"]])
    assert not result.unmatched
    assert result.as_asked == 1.0
    # The rules leave conv1 (3 to 6 channels) and the last product (ten outputs) in float.
    macs = {"conv1": 6 * 75 * 28 * 28, "conv2": 16 * 150 * 100, "fc": 400 * 120 + 120 * 84, "last": 840}
    total = sum(macs.values())
    assert result.shares["int8"] == pytest.approx((macs["conv2"] + macs["fc"]) / total)


def test_precisions_that_a_graph_asks_for() -> None:
    assert [(item.node, item.precision) for item in audit.asked_of(graphs.quantized())] == [("conv1", "int8")]
    assert {item.precision for item in audit.asked_of(graphs.net())} == {"fp32"}


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("int8_macs<0.9", True),
        ("int8_macs < 0.7", False),
        ("int8_macs<=0.7", True),
        ("reformats>3", False),
        ("reformats>=1", True),
        ("layers==4", True),
        ("layers!=4", False),
        ("as_asked<1", True),
        ("unmatched>0", False),
        ("bf16_macs>0", False),
    ],
)
def test_thresholds(text: str, fails: bool) -> None:
    assert Threshold.parse(text).holds(audit.audit(LAYERS, ASKED).metrics()) is fails


@pytest.mark.parametrize(
    "text", ["", "int8_macs", "int8_macs<", "<0.5", "int8_macs<x", "int8_macs=0.5", "a<1e"]
)
def test_wrong_thresholds_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="write a metric"):
        Threshold.parse(text)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match='no metric "int8_mac"; did you mean "int8_macs"'):
        Threshold.parse("int8_mac<1").holds(audit.audit(LAYERS, ASKED).metrics())
    with pytest.raises(RecipeError, match="times need --times"):
        Threshold.parse("reformat_ms>1").holds(audit.audit(LAYERS, ASKED).metrics())


def test_the_json_holds_all(tmp_path: Path) -> None:
    content = json.loads(json.dumps(audit.audit(LAYERS, ASKED).to_json()))
    assert len(content["layers"]) == 4
    assert content["layers"][2]["differs"] is True
