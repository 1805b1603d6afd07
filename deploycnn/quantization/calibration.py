"""Watch a model on calibration images once; choose ranges for any number of plans afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from deploycnn.errors import PassRequirementError
from deploycnn.graph.observe import float_values, observe, refuse_not_finite
from deploycnn.quantization import statistics
from deploycnn.quantization.insertion import ranges_needed
from deploycnn.quantization.ranges import choose_range
from deploycnn.quantization.statistics import Statistics
from deploycnn.quantization.types import Calibrator, Plan, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was seen: independent of any target, so that one serves all.

    Attributes:
        images: How many.
        values: Name of each value -> its summary.
        means: Name of each value whose mean map was asked for -> mean over the first axis (the images), in the shape of
            one image's.
    """

    images: int
    values: Mapping[str, Statistics]
    means: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to one ``.npz`` file, without the mean maps."""
        statistics.save(path, self.values)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what :meth:`save` wrote."""
        values = statistics.load(path)
        return cls(images=max((summary.images for summary in values.values()), default=0), values=values)


def calibrate(
    model: ModelProto,
    images: Iterable[npt.NDArray[np.float32]],
    *,
    values: Sequence[str] | None = None,
    means: Sequence[str] = (),
    histograms: bool = True,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Stream ``images`` through ``model`` and sum up its values.

    Memory depends on the model alone: one batch of its values, a summary of fixed size for each, one image's ``means``.

    Args:
        model: Float, with inferred shapes.
        images: Batches of preprocessed images (N, C, H, W); streamed once, never held together.
        values: Names of the values to sum up: ``values_of`` the plans. All float values by default.
        means: Names of the values whose mean maps are wanted (``inputs_of`` of bias correction).
        histograms: Whether more than "minmax" and "moving_average" will be asked for.
        threads: CPU threads.
        progress: Called with the number of images done.

    Raises:
        PassRequirementError: no images; images of another size or type than the input takes; NaN or infinity in
            an image or in a value (the node is named).
    """
    wanted = float_values(model) if values is None else list(values)
    summaries = {name: Statistics(histogram=histograms) for name in wanted}
    sums: dict[str, npt.NDArray[np.float32]] = {}
    # Not images: a reshape may have folded positions into the first axis.
    rows = dict.fromkeys(means, 0)

    def visit(name: str, content: npt.NDArray[np.float32]) -> None:
        ends = statistics.extremes(content)
        refuse_not_finite(model, name, ends)
        if name in summaries:
            summaries[name].update(content, ends)
        if name in rows:
            total = content.sum(axis=0, dtype=np.float32)
            sums[name] = np.add(sums[name], total, out=sums[name]) if name in sums else total
            rows[name] += len(content)

    watched = [*wanted, *(name for name in means if name not in summaries)]
    count = observe(model, watched, images, visit, threads=threads, progress=progress, check_values=False)
    if not count:
        raise PassRequirementError("no calibration images; give data with a non-empty training split")
    return Calibration(
        images=count,
        values=summaries,
        means={name: total / np.float32(rows[name]) for name, total in sums.items()},
    )


def values_of(*plans: Plan) -> list[str]:
    """Values whose ranges the plans leave to calibration, each once."""
    return list(dict.fromkeys(value for plan in plans for value in ranges_needed(plan)))


def choose_ranges(
    plan: Plan, calibration: Calibration, calibrator: Calibrator = "minmax", percentile: float = 99.999
) -> dict[str, Range]:
    """A range for every activation of ``plan``; tied values get one that suits them all together.

    Args:
        plan: Its number format decides which range is best.
        calibration: Must hold ``values_of(plan)``.
        calibrator: See ``ranges.choose_range``.
        percentile: Likewise.
    """
    groups: dict[str, list[str]] = {}
    for activation in plan.activations:
        if activation.fixed is None:
            groups.setdefault(activation.tied or activation.value, []).append(activation.value)
    found = {}
    for name, members in groups.items():
        seen = [calibration.values[member] for member in members]
        whole = statistics.merged(seen) if len(seen) > 1 else seen[0]
        number = plan.number((whole.low, whole.high))
        found[name] = choose_range(whole, calibrator, percentile, number)
    return {
        activation.value: activation.fixed
        if activation.fixed is not None
        else found[activation.tied or activation.value]
        for activation in plan.activations
    }
