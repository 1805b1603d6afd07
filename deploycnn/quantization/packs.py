"""Rule packs: where each target wants its Q/DQ, as data.

Sources: ONNX Runtime's QDQ selectors (which patterns become ``QLinear*`` operators) and its quantization guide;
NVIDIA's guides to explicit quantization and Model Optimizer's ONNX quantizer; TensorRT-RTX's support matrix.
``docs/quantization.md`` tells the rules in prose. A rule is changed for one model by ``dataclasses.replace``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from deploycnn.errors import RecipeError, nearest
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.types import NumberFormat

#: Operators that only move data: integers pass through them unchanged, so both sides share one scale.
MOVERS = frozenset(
    {
        "MaxPool", "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice",
        "DepthToSpace", "SpaceToDepth", "Resize", "Tile",
    }
)  # fmt: skip

#: Operators with an 8-bit kernel on CPUs. ``HardSigmoid`` has none, but 8 bits on both sides of it let the gate's
#: ``Mul`` run on integers.
CPU_FOLLOWERS = MOVERS | {
    "Add", "Mul", "Sigmoid", "HardSigmoid", "Concat", "AveragePool", "GlobalAveragePool",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RulePack:
    """The rules of one target.

    Attributes:
        target: Its name.
        style: "units": every integer operator stands between DQ and Q, which is what CPU runtimes fuse.
            "inputs": only the inputs of convolutions and matrix products (and of residual additions) are
            rounded, and the compiler finds the rest. "weights": only weights are integers.
        activation: Number format of activations.
        signed: Another one for activations that are negative about as far as positive, where a zero point would cost
            time. ``None``: all have ``activation``.
        weight: Number format of weights.
        sensitive_weight: Number format of weights that suffer most from few bits and take little room: those of first
            and last layers, and of depthwise convolutions. ``None``: that of all others.
        per_channel: One weight scale for each output channel.
        integer_bias: Biases are int32.
        float_operators: Operators with weights that stay float there -> why.
        followers: For "units": operators that stay on integers between convolutions.
        on_integers: For "units": operators that no rule of the runtime makes integer kernels of, though it has such
            kernels: they are written between Q and DQ, where they compute on integers as they stand. "Pad" is known.
        convolves_selections: For "units": shortcuts that only leave out pixels and add channels of zeros become 1x1
            convolutions on integers (``selections.py``).
        convolves_pools: For "units" on x86: average pools become depthwise convolutions on integers (``pools.py``).
        clips: Operators that are folded into the range of the value that they make.
        epilogues: Activations (operators, and "SiLU") that the runtime computes within an integer convolution, so that
            no Q/DQ belongs between.
        float_results: Matrix products whose integer kernel can return float32: no Q behind the last one.
        constant_operands: Which constants additions and products on integers may have: none, single numbers
            (which 8 bits hold exactly), or any.
        float_gates: Whether the small convolutions and products of squeeze-and-excitation gates stay float.
        residual: "both": both inputs of an addition are integers. "shortcut": only the shortcut, so that the
            addition fuses into the convolution on its other input.
        tie_concat: Whether all values joined by a Concat share one scale.
        min_product: Matrix products with fewer rows or columns of weights than this stay float.
        grouped_multiple: Grouped convolutions with output channels that are no multiple of this stay float.
        grouped_kernel: Grouped convolutions with a smaller kernel stay float.
        first_multiple: A first layer stays float unless its input or output channels are a multiple of this.
        integer_batchnorm: Batch norms that no convolution precedes become depthwise convolutions, to run on integers.
        guards_float: Whether float layers between Q/DQ get a guard, without which onnxruntime makes integers of them
            (``guards.py``).
        rewrites: Exact rewrites of the float graph to make first (``rewrites.REWRITES``).
        note: What a user should know before quantizing for this target.
    """

    target: str
    style: Literal["units", "inputs", "weights"]
    activation: NumberFormat
    signed: NumberFormat | None = None
    weight: NumberFormat = field(default=NumberFormat(dtype="int8", symmetric=True))
    sensitive_weight: NumberFormat | None = None
    per_channel: bool = True
    integer_bias: bool
    float_operators: Mapping[str, str] = field(default_factory=dict)
    followers: frozenset[str] = frozenset()
    on_integers: frozenset[str] = frozenset()
    convolves_selections: bool = False
    convolves_pools: bool = False
    clips: frozenset[str] = frozenset({"Relu", "Clip"})
    epilogues: frozenset[str] = frozenset()
    float_results: frozenset[str] = frozenset()
    constant_operands: Literal["none", "scalar", "any"] = "none"
    float_gates: bool = False
    residual: Literal["both", "shortcut"] = "both"
    tie_concat: bool = False
    min_product: int = 1
    grouped_multiple: int = 1
    grouped_kernel: int = 1
    first_multiple: int = 1
    integer_batchnorm: bool = True
    guards_float: bool = False
    rewrites: tuple[str, ...] = ()
    note: str = ""


#: Rewrites for kernels that only x86 has.
X86_REWRITES = frozenset({"align_channels", "align_first_layers"})

_CPU = RulePack(
    target="cpu",
    style="units",
    activation=NumberFormat(dtype="uint8"),
    integer_bias=True,
    float_operators={"ConvTranspose": "no integer kernel"},
    followers=CPU_FOLLOWERS,
    on_integers=frozenset({"Pad"}),
    convolves_pools=True,
    float_results=frozenset({"Gemm", "MatMul"}),
    constant_operands="scalar",
    tie_concat=True,
    # For OpenVINO too, where it costs nothing: onnxruntime judges the accuracy of its files.
    guards_float=True,
    # Behind a convolution HardSwish and HardSigmoid are integer kernels; OpenVINO has its own way with them.
    rewrites=(
        "remove_shuffles",
        "clip_by_range",
        "tile_gates",
        "merge_groups",
        "align_channels",
        "align_first_layers",
    ),
)

_TENSORRT = RulePack(
    target="tensorrt",
    style="inputs",
    activation=NumberFormat(dtype="int8", symmetric=True),
    integer_bias=False,
    float_operators={"ConvTranspose": "INT8 deconvolutions are restricted; measure before quantizing one"},
    float_gates=True,
    residual="shortcut",
    tie_concat=True,
    min_product=16,
    grouped_multiple=8,
    grouped_kernel=3,
    first_multiple=8,
)

PACKS: Mapping[str, RulePack] = {
    pack.target: pack
    for pack in (
        _CPU,
        # A convolution costs OpenVINO 1.6% of ResNet-56, which slices and pads in no time.
        replace(_CPU, target="onnxruntime-cpu", convolves_selections=True),
        replace(
            _CPU,
            target="openvino",
            # Its convolutions pad with the zero point, and correct their sums for it: 5% of GoogLeNet's time for the
            # images alone.
            signed=NumberFormat(dtype="int8", symmetric=True),
            followers=CPU_FOLLOWERS | {"HardSwish"},
            epilogues=frozenset({"HardSwish", "SiLU"}),
            # It computes them in one pass with the activation and the rounding behind them, from integers.
            integer_batchnorm=False,
            convolves_pools=False,
            rewrites=("remove_shuffles",),
        ),
        replace(
            _TENSORRT,
            target="onnxruntime-cuda",
            note="the CUDA provider has no integer convolution; only its TensorRT provider gains from Q/DQ",
        ),
        _TENSORRT,
        replace(
            _TENSORRT,
            target="tensorrt-rtx",
            float_operators={
                **_TENSORRT.float_operators,
                "Conv": "TensorRT-RTX does not accelerate INT8 convolutions",
            },
            note="TensorRT-RTX does not accelerate INT8 convolutions; FP16 is the faster choice there",
        ),
    )
}


def get(target: str, isa: Isa | None = None) -> RulePack:
    """The rules of a target, with the number formats that suit a CPU's 8-bit arithmetic.

    Args:
        target: "cpu" (both CPU runtimes), "onnxruntime-cpu", "openvino", "onnxruntime-cuda", "tensorrt" or
            "tensorrt-rtx".
        isa: The CPU that the graph will run on, for CPU targets; one with a dot product by default. x86 wants
            U8S8 (7-bit weights where it saturates), others S8S8.

    Raises:
        RecipeError: there is no such target; names the nearest.
    """
    if target not in PACKS:
        raise RecipeError(f'target: no placement rules for "{target}"; {nearest(target, PACKS)}')
    pack = PACKS[target]
    if pack.style != "units" or isa is None:
        return pack
    return replace(
        pack,
        activation=NumberFormat(dtype="uint8" if isa.x86 else "int8"),
        weight=replace(pack.weight, reduced=isa.saturates),
        convolves_pools=pack.convolves_pools and isa.x86,
        rewrites=tuple(name for name in pack.rewrites if isa.x86 or name not in X86_REWRITES),
    )


def with_formats(
    pack: RulePack, *, activations: Literal["uint8", "int8"] | None, reduced: bool | None, per_channel: bool
) -> RulePack:
    """``pack`` with number formats that were asked for; ``None`` leaves its own.

    Args:
        pack: A target's rules.
        activations: Their type: "uint8" with zero points, "int8" symmetric, for signed and unsigned values alike.
        reduced: Whether weights have 7 bits.
        per_channel: Whether weights have one scale per output channel.
    """
    if activations is not None:
        activation = NumberFormat(dtype=activations, symmetric=activations == "int8")
        pack = replace(pack, activation=activation, signed=None)
    if reduced is not None:
        pack = replace(pack, weight=replace(pack.weight, reduced=reduced))
    return replace(pack, per_channel=per_channel)


def weights_only(pack: RulePack, dtype: Literal["int8", "int4"] = "int8") -> RulePack:
    """``pack`` for smaller files: weights as integers, everything computed in float."""
    eight = NumberFormat(dtype="int8", symmetric=True)
    return replace(
        pack,
        weight=NumberFormat(dtype=dtype, symmetric=True),
        sensitive_weight=eight if dtype == "int4" else None,
        style="weights",
        integer_bias=False,
        rewrites=(),  # they are for integer kernels
    )


def four_bits(pack: RulePack) -> RulePack:
    """``pack`` with 4-bit weights, except those of ``sensitive_weight``; activations stay as they are."""
    return replace(pack, weight=NumberFormat(dtype="int4", symmetric=True), sensitive_weight=pack.weight)
