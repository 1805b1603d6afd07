"""What quantization to 8 bits can be told, and what it means for the search and for number formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Interval

from deploycnn import targets
from deploycnn.errors import PassRequirementError

if TYPE_CHECKING:
    from deploycnn.quantization.packs import RulePack
    from deploycnn.quantization.quantize import Options

#: Name of the rung that trains.
QAT = "qat"

_QAT_EPOCHS = 2

#: Outputs with less than 1% noise are good enough to spare the passes over the images that equalizing takes.
_GOOD_DB = 20.0

#: The budget of ``auto`` where the recipe gives none.
_AUTO_BUDGET = 0.002


@dataclass(frozen=True, kw_only=True)
class Int8Settings:
    """How to quantize a float graph.

    Raises:
        ValueError: options contradict each other.
    """

    mode: Annotated[
        Literal["fixed", "auto"], "fixed: as the options say; auto: repair until the budget is met."
    ] = "fixed"
    max_top1_drop: Annotated[
        float | None,
        Interval(ge=0, lt=1),
        "Budget on the validation split, a fraction of 1; layers stay float as needed. null: auto 0.002, else "
        "none.",
    ] = None
    calibrator: Annotated[
        Literal["auto", "minmax", "moving_average", "percentile", "entropy", "mse"],
        "Range of activations: all values seen, each image's ends averaged, all but the outermost values, least "
        "KL divergence, or least squared error. auto: minmax, percentile or mse, whichever leaves the outputs of "
        "validation images the least noise (mode auto begins with percentile).",
    ] = "auto"
    percentile: Annotated[
        float,
        Interval(gt=50, le=100),
        "For `percentile`: percent of the values that each end of the range covers.",
    ] = 99.999
    calibration_images: Annotated[int, Ge(1), "Training images to calibrate on, evenly over the classes."] = (
        512
    )
    judge_images: Annotated[
        int | None, Ge(1), "Validation images that a budget is judged on, evenly over the classes; null: all."
    ] = None
    per_channel: Annotated[bool, "One weight scale per output channel instead of one per layer."] = True
    activations: Annotated[
        Literal["auto", "uint8", "int8"],
        "Type of activations; auto: uint8 on x86, asymmetric int8 on other CPUs, symmetric int8 on GPUs.",
    ] = "auto"
    reduce_range: Annotated[
        bool | None,
        "7-bit weights; by default only where this x86 CPU's 8-bit arithmetic saturates (no VNNI).",
    ] = None
    weights: Annotated[
        Literal["int8", "int4"],
        "Type of weights; int4: scales of least squared error, two to a byte, for size. For CPU targets.",
    ] = "int8"
    weights_only: Annotated[
        bool, "Leave activations in float: a smaller file, no gain in speed. For CPU targets."
    ] = False
    equalize: Annotated[
        bool | None,
        "Spread the ranges of channels evenly over neighbouring layers (Nagel et al. 2019). null: where outputs have "
        "more than 1% noise, and get less noisy by it. With mode auto it is a rung that may be needed, unless false.",
    ] = None
    absorb_bias: Annotated[
        bool, "Move biases that always pass a ReLU into the next layer (Nagel et al. 2019)."
    ] = False
    correct_bias: Annotated[
        bool | None,
        "Take the mean error that rounding the weights makes out of the biases (Nagel et al. 2019). null: where "
        "outputs get less noisy by it. With mode auto it is a rung that may be needed, unless false.",
    ] = None
    adaround: Annotated[
        bool | None,
        "Learn for each weight whether to round up or down (Nagel et al. 2020); minutes. null: with 4-bit weights. "
        "With auto it is a rung that may be needed, unless false.",
    ] = None
    qat_epochs: Annotated[
        int,
        Ge(0),
        "For auto: epochs of quantization-aware training, tried before more than a few layers stay float; "
        "0: no training and no such limit.",
    ] = _QAT_EPOCHS
    do_no_harm: Annotated[
        bool,
        "Leave in float what is measured slower on integers on the target; where no integer graph is faster, "
        "return float. What is timed decides, so equal runs may differ where it is close.",
    ] = True
    exclude: Annotated[tuple[str, ...], "Names of nodes to leave in float."] = ()
    rules: Annotated[
        Literal["target", "onnxruntime-cpu", "openvino", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"],
        "Whose placement rules; target: those of the recipe's target.",
    ] = "target"

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.weights_only and self.mode == "auto":
            raise ValueError(
                "weights_only does not go with auto, which repairs activations; set max_top1_drop instead"
            )
        given = {name for name in ("equalize", "absorb_bias", "correct_bias") if getattr(self, name)}
        given |= {"calibrator"} if self.calibrator != "auto" else set()
        if self.mode == "auto" and given:
            raise ValueError(
                f"auto chooses ranges and remedies itself; leave out {', '.join(sorted(given))}, or mode"
            )
        if self.mode == "fixed" and self.qat_epochs != _QAT_EPOCHS:
            raise ValueError("qat_epochs is for auto; put the pass qat behind int8 instead")
        if self.judge_images is not None and self.mode == "fixed" and self.max_top1_drop is None:
            raise ValueError("judge_images judge a budget, and there is none; give max_top1_drop too")
        if self.weights_only and self.activations != "auto":
            raise ValueError("weights_only leaves activations in float; leave `activations` out")

    def options(self) -> Options:
        """What is tried, in which order, and what is kept."""
        from deploycnn.quantization.quantize import COMPARED, FEW_FLOAT_LAYERS, FLOAT_LAYERS, Options

        if self.mode == "auto":
            return Options(
                calibrator="percentile",
                exclude=self.exclude,
                ladder=(
                    "mse",
                    *(
                        name
                        for name in ("equalize", "correct_bias", "adaround")
                        if getattr(self, name) is not False
                    ),
                    *((FEW_FLOAT_LAYERS, QAT) if self.qat_epochs else ()),
                    FLOAT_LAYERS,
                ),
                max_top1_drop=_AUTO_BUDGET if self.max_top1_drop is None else self.max_top1_drop,
            )
        # Nothing has a range where activations stay float.
        compared = None if self.calibrator == "auto" and not self.weights_only else False
        wanted: tuple[tuple[str, bool | None], ...] = (
            # Asked for: ranges are chosen for the graph that comes of it.
            ("equalize", bool(self.equalize)),
            ("absorb_bias", self.absorb_bias),
            *((name, compared) for name in COMPARED),
            # Not asked for: whether it is needed is known with the best ranges.
            ("equalize", None if self.equalize is None else False),
            ("adaround", self._learns_rounding),
            # Last: biases make up for the rounding that was decided.
            ("correct_bias", self.correct_bias),
        )
        return Options(
            calibrator="minmax" if self.calibrator == "auto" else self.calibrator,
            exclude=self.exclude,
            remedies=tuple(name for name, asked in wanted if asked is not False),
            if_better={
                name: _GOOD_DB if name == "equalize" else math.inf for name, asked in wanted if asked is None
            },
            ladder=(FLOAT_LAYERS,),
            max_top1_drop=self.max_top1_drop,
        )

    @property
    def _learns_rounding(self) -> bool:
        return self.weights == "int4" if self.adaround is None else self.adaround

    def check_formats(self, target: str) -> None:
        """Refuse number formats that the target's rules have no place for.

        Raises:
            PassRequirementError: 4-bit or lone weights, or uint8 activations, on a GPU.
        """
        if targets.get(target).device == "cpu":
            return
        if self.activations == "uint8":
            raise PassRequirementError(
                f"int8: activations: uint8 is for CPU targets, not {target}, which wants them symmetric; leave it out"
            )
        if self.weights_only or self.weights == "int4":
            raise PassRequirementError(
                f"int8: {'weights_only' if self.weights_only else 'weights: int4'} is for CPU targets, not {target}: "
                "its kernels for convolutions take 8-bit weights beside 8-bit activations"
            )

    def pack(self, target: str) -> RulePack:
        """The target's rules, with what the settings say of number formats.

        Raises:
            PassRequirementError: see ``check_formats``.
        """
        self.check_formats(target)
        from deploycnn.quantization import packs
        from deploycnn.quantization.isa import detect_isa

        pack = packs.with_formats(
            packs.get(target, detect_isa()),
            activations=None if self.activations == "auto" else self.activations,
            reduced=self.reduce_range,
            per_channel=self.per_channel,
        )
        if self.weights_only:
            return packs.weights_only(pack, self.weights)
        return packs.four_bits(pack) if self.weights == "int4" else pack
