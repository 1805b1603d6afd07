"""Candidates for a quantized graph and what is done to them: other ranges, recovered weights, layers left in float.

One calibration serves every candidate with the same float graph: a candidate that rounds other values than those seen
so far only adds these. Changed weights are another float graph, which is watched anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deploycnn.quantization.bias_correction import correct_biases, inputs_of
from deploycnn.quantization.calibration import Calibration, calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.placement import place
from deploycnn.quantization.types import Calibrator, IntegerWeight, Plan, Range

if TYPE_CHECKING:
    from onnx import ModelProto

#: Gives the calibration images (N, C, H, W) anew at each call, always the same.
Images = Callable[[], Iterable[npt.NDArray[np.float32]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to quantize a model.

    Attributes:
        model: The float graph, prepared; its weights may be equalized, its high biases absorbed.
        calibrator: How ranges are chosen.
        weights: Integer weights by initializer, where they are not those of rounding to nearest.
        shifts: By node, what its rounded weights add to its output channels on average: taken away from its bias
            where it is quantized, and only there, so that layers which stay float compute what they always did.
        keep_float: Names of nodes that stay float.
        graph: The finished graph, where it cannot be made from the above (trained weights and scales).
    """

    model: ModelProto
    calibrator: Calibrator
    weights: Mapping[str, IntegerWeight] = field(default_factory=dict)
    shifts: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    keep_float: frozenset[str] = frozenset()
    graph: ModelProto | None = None


class Engine:
    """Builds candidates for one target from one set of calibration images.

    Args:
        pack: The target's rules.
        images: Calibration images.
        percentile: For the calibrator of that name.
        mean_maps: Whether mean maps will be asked for: they are then summed up in the same pass over the images.
        threads: CPU threads.
        progress: Called with the number of images calibrated.
    """

    def __init__(
        self,
        pack: RulePack,
        images: Images,
        *,
        percentile: float = 99.999,
        mean_maps: bool = False,
        threads: int = 1,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.pack = pack
        self.images = images
        self.threads = threads
        self._percentile = percentile
        self._mean_maps = mean_maps
        self._progress = progress
        # The graphs are kept with what was seen of them: an identity must not be used again.
        self._seen: dict[int, tuple[ModelProto, Calibration]] = {}
        #: Ranges by placement and calibrator, with their graph: a search takes as long as judging a candidate.
        self._found: dict[tuple[int, frozenset[str], Calibrator], tuple[ModelProto, Mapping[str, Range]]] = {}

    def plan(self, candidate: Candidate) -> Plan:
        """What the candidate rounds."""
        return place(candidate.model, self.pack, candidate.keep_float)

    def look_ahead(self, candidate: Candidate, sets: Iterable[Collection[str]]) -> None:
        """Calibrate in one go for candidates that keep these sets of nodes in float."""
        plans = [self.plan(replace(candidate, keep_float=frozenset(kept))) for kept in sets]
        self.calibration(candidate.model, *plans)

    def calibration(self, model: ModelProto, *plans: Plan) -> Calibration:
        """What was seen of the values that ``plans`` round, on the calibration images.

        Raises:
            PassRequirementError: no images, or images or values that no range can be chosen from.
        """
        seen = self._seen.get(id(model), (model, Calibration(images=0, values={})))[1]
        missing = [name for name in values_of(*plans) if name not in seen.values]
        means = [name for plan in plans if self._mean_maps for name in inputs_of(model, plan)]
        means = [name for name in dict.fromkeys(means) if name not in seen.means]
        if missing or means:
            found = calibrate(
                model,
                self.images(),
                values=missing,
                means=means,
                threads=self.threads,
                progress=self._progress,
            )
            seen = Calibration(
                images=found.images,
                values={**seen.values, **found.values},
                means={**seen.means, **found.means},
            )
            self._seen[id(model)] = (model, seen)
        return seen

    def mean_maps(self, candidate: Candidate) -> Mapping[str, npt.NDArray[np.float32]]:
        """What the layers read whose biases can be corrected, on average over the calibration images."""
        self._mean_maps = True
        return self.calibration(candidate.model, self.plan(candidate)).means

    def ranges(self, candidate: Candidate) -> Mapping[str, Range]:
        """The range of every value that the candidate rounds."""
        key = (id(candidate.model), candidate.keep_float, candidate.calibrator)
        if key not in self._found:
            plan = self.plan(candidate)
            seen = self.calibration(candidate.model, plan)
            ranges = choose_ranges(plan, seen, candidate.calibrator, self._percentile)
            self._found[key] = candidate.model, ranges
        return self._found[key][1]

    def build(self, candidate: Candidate) -> ModelProto:
        """The candidate's graph; the float graph where nothing in it is to be quantized."""
        if candidate.graph is not None:
            return candidate.graph
        plan = self.plan(candidate)
        if not plan.quantized_nodes and not plan.weights:
            return candidate.model
        held = {item.initializer for item in plan.weights}
        model, ranges = candidate.model, self.ranges(candidate)
        if shifts := {
            item.node: candidate.shifts[item.node] for item in plan.weights if item.node in candidate.shifts
        }:
            # Ranges are of the uncorrected graph: that is what rounded layers with corrected biases come back to.
            model = correct_biases(model, shifts)
            plan = place(model, self.pack, candidate.keep_float)
        return build(
            model,
            plan,
            ranges,
            {name: weight for name, weight in candidate.weights.items() if name in held},
        )

    def layers(self, candidate: Candidate) -> tuple[str, ...]:
        """Names of the convolutions and matrix products that the candidate quantizes."""
        plan = self.plan(candidate)
        return tuple(dict.fromkeys(item.node for item in plan.weights))
