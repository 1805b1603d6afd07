"""Which layers cost accuracy when they are integers, and what they earn: both measured, layer by layer.

A layer's cost is the error of the model's outputs when only that layer is quantized. Errors of different layers are
nearly uncorrelated, so their powers add up, which lets one measurement of each layer predict any set of layers (Zhou
et al. 2018, "Adaptive Quantization for Deep Neural Network"; the prediction is verified on the set that is chosen).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from deploycnn.core import Json
from deploycnn.quantization.judge import Judge, Judgement

if TYPE_CHECKING:
    from onnx import ModelProto

#: Names of the layers that stay float -> the Q/DQ graph.
Build = Callable[[Collection[str]], "ModelProto"]

#: Candidates judged at most when layers are given back to the integers.
_GIVE_BACK_TRIALS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """A layer as the only quantized one.

    Attributes:
        node: Name of the convolution or matrix product.
        sqnr_db: Of the model's outputs.
        top1_drop: Of the model; ``None`` where it is no classifier.
        gain_ms: Time that integers save in this layer on the target; ``None`` where it was not measured.
        macs: Of the layer, per image; what stands for the gain where there is no time.
    """

    node: str
    sqnr_db: float
    top1_drop: float | None
    gain_ms: float | None
    macs: int

    @property
    def noise(self) -> float:
        """Power of the outputs' error as a share of their power."""
        return float(10.0 ** (-self.sqnr_db / 10.0))

    def to_json(self) -> Json:
        """The record."""
        return asdict(self)


def measure_sensitivity(
    layers: Sequence[str],
    build: Build,
    judge: Judge,
    *,
    gains_ms: Mapping[str, float] | None = None,
    macs: Mapping[str, int] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Sensitivity, ...]:
    """Quantize each of ``layers`` alone and judge the model.

    Args:
        layers: Names of all layers that could be integers.
        build: Makes a graph in which given layers stay float.
        judge: Compares it with the float graph; a few hundred images suffice for the signal-to-noise ratio.
        gains_ms: Measured float time minus integer time by layer.
        macs: Multiply-accumulates by layer.
        progress: Told how many of how many are done.
    """
    found = []
    everything = frozenset(layers)
    for index, layer in enumerate(layers):
        progress(index, len(layers))
        judgement = judge(build(everything - {layer}))
        found.append(
            Sensitivity(
                node=layer,
                sqnr_db=judgement.sqnr_db,
                top1_drop=judgement.top1_drop,
                gain_ms=None if gains_ms is None else gains_ms.get(layer),
                macs=(macs or {}).get(layer, 0),
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Layers left in float for accuracy's sake.

    Attributes:
        keep_float: Their names.
        judgement: Of the graph with these layers in float.
        met: Whether the budget is met.
        trials: How many graphs were judged.
    """

    keep_float: frozenset[str]
    judgement: Judgement
    met: bool
    trials: int


def keep_within(
    max_top1_drop: float,
    sensitivities: Sequence[Sensitivity],
    build: Build,
    judge: Callable[[ModelProto], Judgement],
    *,
    always_float: Collection[str] = (),
) -> Mixed:
    """The cheapest layers to keep in float so that the drop of top-1 stays in a budget.

    Layers are ranked by the error that they save for each millisecond that they cost (the greedy rule of the
    fractional knapsack); the shortest prefix that meets the budget is found by bisection on judged graphs,
    and then layers are given back to the integers, the dearest first, as long as the budget holds.

    Args:
        max_top1_drop: The budget, a fraction of 1.
        sensitivities: Of all layers.
        build: Makes a graph in which given layers stay float.
        judge: On all the images that are to decide.
        always_float: Layers that stay float in any case.
    """
    fixed = frozenset(always_float)
    ranked = sorted(
        (layer for layer in sensitivities if layer.node not in fixed),
        key=lambda layer: (-layer.noise / _cost(layer, sensitivities), layer.node),
    )
    judged: dict[int, Judgement] = {}

    def at(count: int) -> Judgement:
        if count not in judged:
            judged[count] = judge(build(fixed | {layer.node for layer in ranked[:count]}))
        return judged[count]

    low, high = 0, len(ranked)
    if not at(low).within(max_top1_drop):
        if not at(high).within(max_top1_drop):
            return Mixed(
                keep_float=fixed | {layer.node for layer in ranked},
                judgement=at(high),
                met=False,
                trials=len(judged),
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle).within(max_top1_drop) else (middle, high)
        low = high
    chosen, judgement = list(ranked[:low]), at(low)
    trials = len(judged)
    for layer in sorted(chosen, key=lambda layer: -_cost(layer, sensitivities))[:_GIVE_BACK_TRIALS]:
        fewer = [other for other in chosen if other is not layer]
        trial = judge(build(fixed | {other.node for other in fewer}))
        trials += 1
        if trial.within(max_top1_drop):
            chosen, judgement = fewer, trial
    return Mixed(
        keep_float=fixed | {layer.node for layer in chosen}, judgement=judgement, met=True, trials=trials
    )


def share_given_up(kept: Collection[str], layers: Sequence[Sensitivity]) -> float:
    """What keeping some layers float costs, as a share of what integers save in all of them."""
    return sum(_share(layer, layers) for layer in layers if layer.node in kept)


def _share(layer: Sensitivity, layers: Sequence[Sensitivity]) -> float:
    """A layer's part of what integers save: of the measured time, or of the multiply-accumulates without one."""
    if layer.gain_ms is not None:
        total = sum(max(other.gain_ms, 0.0) for other in layers if other.gain_ms is not None)
        return max(layer.gain_ms, 0.0) / total if total > 0 else 0.0
    macs = sum(other.macs for other in layers)
    return layer.macs / macs if macs else 1.0 / max(len(layers), 1)


def _cost(layer: Sensitivity, layers: Sequence[Sensitivity]) -> float:
    """What keeping the layer float costs; never zero, so that a free layer ranks first."""
    return max(_share(layer, layers), 1e-4)
