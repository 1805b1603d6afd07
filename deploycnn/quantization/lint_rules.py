"""The rules of ``deploycnn lint``: identifiers, severities and mends, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploycnn.errors import RecipeError, nearest

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule.

    Attributes:
        id: "QDQ001", ...; never given to another rule.
        severity: "error": wrong results, or no gain at all. "warning": slower or less accurate than it could be.
            "note": worth knowing; never a reason for a non-zero exit code.
        title: What is wrong, in few words.
        mend: How to put it right.
    """

    id: str
    severity: Severity
    title: str
    mend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A place where a file breaks a rule.

    Attributes:
        rule: Its identifier.
        severity: As in ``Rule``; a rule may be milder on some targets.
        node: Name of the node.
        what: What is wrong there.
        mend: How to put it right.
    """

    rule: str
    severity: Severity
    node: str
    what: str
    mend: str


_ALL = (
    # The numbers.
    Rule(
        id="QDQ001",
        severity="error",
        title="operators of another quantization format",
        mend="quantize again in Q/DQ format (onnxruntime: QuantFormat.QDQ)",
    ),
    Rule(
        id="QDQ002",
        severity="error",
        title="activations of a type that the target has no fast kernel for",
        mend="quantize activations to the type that the rules of the target name",
    ),
    Rule(
        id="QDQ003",
        severity="error",
        title="asymmetric activations on a symmetric target",
        mend="use symmetric ranges, so that every zero point is 0",
    ),
    Rule(
        id="QDQ004",
        severity="error",
        title="activations with a scale per channel",
        mend="use one scale for a whole activation; only weights may have one per channel",
    ),
    Rule(
        id="QDQ005",
        severity="error",
        title="weights that are not symmetric signed integers",
        mend="quantize weights to symmetric int8 with zero point 0",
    ),
    Rule(
        id="QDQ006",
        severity="warning",
        title="weights without a scale per output channel",
        mend="use one scale per output channel (axis 0 of a convolution)",
    ),
    Rule(
        id="QDQ007",
        severity="warning",
        title="8-bit weights on a CPU whose 8-bit multiply-add saturates",
        mend="use 7-bit weights (reduce_range), or a CPU with VNNI",
    ),
    Rule(
        id="QDQ008",
        severity="error",
        title="a scale that is not a positive normal number",
        mend="calibrate again, and guard channels and values that are always zero",
    ),
    Rule(
        id="QDQ009",
        severity="error",
        title="a bias in the wrong type",
        mend="CPU kernels take int32 biases (scale: input scale x weight scale), TensorRT takes float ones",
    ),
    Rule(
        id="QDQ010",
        severity="error",
        title="a bias whose scale is not input scale x weight scale",
        mend="store the bias with that scale and zero point 0: kernels assume it",
    ),
    Rule(
        id="QDQ011",
        severity="note",
        title="weights only: the file is smaller, and everything is computed in float",
        mend="quantize activations too, where speed is wanted",
    ),
    Rule(
        id="QDQ012",
        severity="note",
        title="weights stored as float with a QuantizeLinear behind them",
        mend="store the integers: the file gets four times smaller",
    ),
    Rule(
        id="QDQ013",
        severity="warning",
        title="4-bit weights that DequantizeLinear reads itself: onnxruntime computes the layer in float",
        mend="put a Cast to INT8 in front of DequantizeLinear: it is folded when the file is loaded",
    ),
    Rule(
        id="QDQ014",
        severity="error",
        title="4-bit weights on a target whose convolutions take 8",
        mend="quantize weights to int8",
    ),
    Rule(
        id="QDQ015",
        severity="warning",
        title="weights only, behind DequantizeLinear: onnxruntime converts them at every call",
        mend="use a Cast and a Mul by the scale instead: they are folded when the file is loaded",
    ),
    # Where Q/DQ stand.
    Rule(
        id="QDQ101",
        severity="error",
        title="a layer of which only one side is quantized",
        mend="put Q/DQ on the layer's input and integers into its weights, or leave both float",
    ),
    Rule(
        id="QDQ102",
        severity="note",
        title="a layer left in float that the target runs on integers",
        mend="quantize it, unless it was kept for its accuracy or measured slower",
    ),
    Rule(
        id="QDQ103",
        severity="warning",
        title="a layer quantized that is better left in float on the target",
        mend="leave it float",
    ),
    Rule(
        id="QDQ104",
        severity="error",
        title="a result that is not rounded for all its readers, so that its maker runs in float",
        mend="put one Q/DQ pair behind it that all its readers share",
    ),
    Rule(
        id="QDQ105",
        severity="error",
        title="Q/DQ between a layer and its ReLU or clip",
        mend="round behind the activation only",
    ),
    Rule(
        id="QDQ106",
        severity="warning",
        title="Q/DQ inside an activation or gate that the target computes in one piece",
        mend="round behind the product only",
    ),
    Rule(
        id="QDQ107",
        severity="warning",
        title="a residual addition with the wrong inputs rounded",
        mend="round the shortcut only: the other input is added within its convolution",
    ),
    Rule(
        id="QDQ108",
        severity="warning",
        title="a concatenation of values with different scales",
        mend="give what is joined, and what it makes, one scale",
    ),
    Rule(
        id="QDQ109",
        severity="error",
        title="different scales on the two sides of an operator that only moves data",
        mend="use the input's scale for its output as well",
    ),
    Rule(
        id="QDQ110",
        severity="warning",
        title="a mean or pool that is rounded on one side only",
        mend="round in front of it and behind it, or neither",
    ),
    Rule(
        id="QDQ111",
        severity="warning",
        title="Q/DQ where the target's rules want none",
        mend="take the pair out: rounding costs accuracy, and going between float and integers time",
    ),
    Rule(
        id="QDQ112",
        severity="warning",
        title="a value that is rounded more than once",
        mend="keep one Q/DQ pair per value",
    ),
    Rule(
        id="QDQ113",
        severity="error",
        title="a layer left in float, which onnxruntime makes integers of with one scale for all its weights",
        mend="put a LeakyRelu behind it (slope 1 changes nothing, slope 0 is ReLU), quantize it, or disable "
        "onnxruntime's optimizer WeightBiasQuantization",
    ),
)

RULES = {rule.id: rule for rule in _ALL}


def rule(identifier: str) -> Rule:
    """The rule called ``identifier``.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    if identifier not in RULES:
        raise RecipeError(f'unknown lint rule "{identifier}"; {nearest(identifier, RULES)}')
    return RULES[identifier]
