"""From a float graph to the integer graph that ships: fixed settings, an accuracy budget, or the repair ladder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, get_args

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.quantization.engine import Candidate, Engine
from deploycnn.quantization.judge import Judge, Judgement
from deploycnn.quantization.ladder import Rung, Tried, climb
from deploycnn.quantization.remedies import Remedy
from deploycnn.quantization.sensitivity import Sensitivity, keep_within, measure_sensitivity, share_given_up
from deploycnn.quantization.types import Calibrator

if TYPE_CHECKING:
    from onnx import ModelProto

#: The rungs that keep layers in float: as many as the budget needs, and only if these are few.
FLOAT_LAYERS, FEW_FLOAT_LAYERS = "float layers", "few float layers"

#: Ranges that are compared with "minmax" where none are asked for; the others seldom win.
COMPARED: tuple[Calibrator, ...] = ("percentile", "mse")

#: Few are those that give up at most this share of what integers save; beyond, training is tried first.
FEW = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked of ``quantize``.

    Attributes:
        calibrator: How ranges are chosen at first.
        exclude: Names of nodes that stay float in any case.
        remedies: Names of remedies that are applied before anything else, in this order.
        if_better: Those of them that stay only where the outputs get less noisy by them, with the signal-to-noise
            ratio in decibels from which on they are not tried.
        ladder: Names of remedies that are tried while the budget is not met, in this order.
        max_top1_drop: The budget; ``None`` where nothing is judged.
    """

    calibrator: Calibrator
    exclude: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    if_better: Mapping[str, float] = field(default_factory=dict)
    ladder: tuple[str, ...] = ()
    max_top1_drop: float | None = None


@dataclass(slots=True, kw_only=True)
class Quantized:
    """The outcome.

    Attributes:
        candidate: What the graph was built from.
        model: The graph.
        judgement: Of it, on the images that chose; ``None`` where nothing was judged.
        met: Whether the budget is met; ``None`` without one.
        remedies: Names of those that stayed, in the order in which they were applied; a later one may take the place of
            what an earlier one did.
        compared: What was tried for less noise, on the images of the quick judge, in order.
        tried: What was tried for the budget, in order.
        sensitivities: Of the layers, where they were measured.
        accuracy_float: Layers left in float for the budget's sake.
    """

    candidate: Candidate
    model: ModelProto
    judgement: Judgement | None = None
    met: bool | None = None
    remedies: tuple[str, ...] = ()
    compared: tuple[Tried, ...] = ()
    tried: tuple[Tried, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    accuracy_float: frozenset[str] = field(default_factory=frozenset)

    def to_json(self) -> Json:
        """What the record says of the search."""
        found: dict[str, Json] = {"remedies": list(self.remedies)}
        if self.judgement is not None:
            found["judged"] = self.judgement.to_json()
            found["budget_met"] = self.met
        if self.accuracy_float:
            found["float_for_accuracy"] = sorted(self.accuracy_float)
        return found


class Quantizer:
    """Quantizes one model for one target.

    Args:
        model: The float graph, prepared.
        engine: Builds candidates.
        judge: Compares graphs with ``model`` on validation images; ``None`` where there is no budget.
        quick_judge: The same on fewer images, for the sensitivity of layers and for what stays if it is better.
        remedies: What may be applied, by name; ``FLOAT_LAYERS`` and ``FEW_FLOAT_LAYERS`` are always there.
        gains_ms: Time that integers save in each layer, asked when layers are to be left in float.
        macs: Multiply-accumulates by layer.
        tell: Told what is being done.
    """

    def __init__(
        self,
        model: ModelProto,
        engine: Engine,
        *,
        judge: Judge | None = None,
        quick_judge: Judge | None = None,
        remedies: Mapping[str, Remedy] | None = None,
        gains_ms: Callable[[ModelProto], Mapping[str, float] | None] = lambda _: None,
        macs: Mapping[str, int] | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._judge = judge
        self._quick_judge = quick_judge
        self._remedies: Mapping[str, Remedy] = {
            **(remedies or {}),
            FEW_FLOAT_LAYERS: partial(self._keep_float_layers, most=FEW),
            FLOAT_LAYERS: self._keep_float_layers,
        }
        self._gains_ms = gains_ms
        self._macs = macs
        self._tell = tell
        self._budget = 0.0
        self._sensitivities: tuple[Sensitivity, ...] = ()
        #: What was searched for layers to keep in float, and the layers that were found.
        self._searched: tuple[Candidate, frozenset[str]] | None = None

    def run(self, options: Options) -> Quantized:
        """Quantize as asked.

        Raises:
            PassRequirementError: the model or the images do not suit; a remedy that was asked for does not.
        """
        start, applied, compared = self._remedied(options)
        if options.max_top1_drop is None or self._judge is None:
            return Quantized(
                candidate=start, model=self._engine.build(start), remedies=tuple(applied), compared=compared
            )
        self._budget = options.max_top1_drop
        found = climb(
            start,
            [Rung(name=name, apply=self._remedies[name]) for name in options.ladder],
            self._engine.build,
            self._judge,
            max_top1_drop=options.max_top1_drop,
            first=" + ".join((start.calibrator, *applied)),
            tell=self._tell,
        )
        kept = any(step.rung in {FLOAT_LAYERS, FEW_FLOAT_LAYERS} and step.kept for step in found.tried)
        return Quantized(
            candidate=found.candidate,
            model=found.model,
            judgement=found.judgement,
            met=found.met,
            remedies=(*applied, *_remedies(found.tried)),
            compared=compared,
            tried=found.tried,
            sensitivities=self._sensitivities,
            accuracy_float=self._searched[1] if kept and self._searched is not None else frozenset(),
        )

    def _remedied(self, options: Options) -> tuple[Candidate, list[str], tuple[Tried, ...]]:
        """The candidate with the remedies that were asked for, their names, and what was compared on the way."""
        start = Candidate(
            model=self._model, calibrator=options.calibrator, keep_float=frozenset(options.exclude)
        )
        applied: list[str] = []
        compared: list[Tried] = []
        for optional, names in itertools.groupby(options.remedies, options.if_better.__contains__):
            if optional:
                assert self._quick_judge is not None  # noqa: S101 - whoever has options that need it gives it
                found = climb(
                    start,
                    [
                        Rung(name=name, apply=self._remedies[name], below_db=options.if_better[name])
                        for name in names
                    ],
                    self._engine.build,
                    self._quick_judge,
                    max_top1_drop=None,
                    first=" + ".join((start.calibrator, *applied)),
                    tell=self._tell,
                )
                start = found.candidate
                compared += found.tried
                applied += _remedies(found.tried)
                continue
            for name in names:
                self._tell(name)
                start = self._remedies[name](start)
                applied.append(name)
        return start, applied, tuple(compared)

    def _keep_float_layers(self, best: Candidate, most: float = 1.0) -> Candidate:
        """Leave the cheapest layers in float that bring the model within the budget.

        Raises:
            PassRequirementError: they give up more than the share ``most`` of what integers save.
        """
        if self._searched is None:
            self._searched = best, self._float_layers(best)
        start, kept = self._searched
        share = share_given_up(kept, self._sensitivities)
        if share > most:
            raise PassRequirementError(
                f"{len(kept)} of {len(self._sensitivities)} layers would stay float, which gives up "
                f"{100 * share:.0f}% of what integers save; more than {100 * most:.0f}% is the last resort"
            )
        # Of the candidate that was searched: trained weights belong to one placement.
        return replace(start, keep_float=start.keep_float | kept)

    def _float_layers(self, best: Candidate) -> frozenset[str]:
        """The cheapest layers to keep in float, by measured sensitivity and judged sets."""
        assert self._judge is not None  # noqa: S101 - a rung of the ladder, which judges
        judge = self._quick_judge or self._judge
        layers = self._engine.layers(best)
        everything = best.keep_float | frozenset(layers)
        self._engine.look_ahead(best, [everything - {layer} for layer in layers])

        def build(kept: Iterable[str]) -> ModelProto:
            return self._engine.build(replace(best, keep_float=best.keep_float | frozenset(kept)))

        self._sensitivities = measure_sensitivity(
            layers,
            build,
            judge,
            gains_ms=self._gains_ms(self._engine.build(best)),
            macs=self._macs,
            progress=lambda done, total: self._tell(f"sensitivity of layer {done + 1} of {total}"),
        )
        whole = self._judge
        trials = itertools.count(1)

        def tried(graph: ModelProto) -> Judgement:
            self._tell(f"judging set {next(trials)} of layers in float")
            return whole(graph)

        found = keep_within(self._budget, self._sensitivities, build, tried)
        return found.keep_float


def _remedies(tried: Sequence[Tried]) -> list[str]:
    """Those that stayed; one choice of ranges takes the place of another, and the candidate knows the last."""
    return [step.rung for step in tried[1:] if step.kept and step.rung not in get_args(Calibrator)]


def ladder_table(tried: Sequence[Tried]) -> list[tuple[str | float | bool | None, ...]]:
    """Rows: rung, kept, change of top-1 in points, agreement in percent, SQNR in dB, seconds, why it was undone."""
    return [
        (
            step.rung,
            step.kept,
            None
            if step.judgement is None or step.judgement.top1_drop is None
            else 0.0 - 100 * step.judgement.top1_drop,  # not -0
            None
            if step.judgement is None or step.judgement.agreement is None
            else 100 * step.judgement.agreement,
            None if step.judgement is None else step.judgement.sqnr_db,
            step.seconds,
            step.why,
        )
        for step in tried
    ]
