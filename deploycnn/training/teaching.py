"""What ``distill`` and ``qat`` can be told about how a teacher teaches. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypedDict

from annotated_types import Ge, Gt

Method = Literal["kd", "dkd", "dist"]

#: Weights and temperature where the recipe gives none: those of the papers, except beta of dkd.
#: There it is 0.5 to 8 by dataset; 8 kept a student from learning at all in 6 short epochs, 2 did not.
_TEMPERATURE: Mapping[Method, float] = {"kd": 4.0, "dkd": 4.0, "dist": 1.0}
_BETA: Mapping[Method, float] = {"kd": 0.0, "dkd": 2.0, "dist": 1.0}


class Weights(TypedDict):
    """Of the terms of :class:`~deploycnn.training.losses.Distillation`."""

    temperature: float
    alpha: float
    beta: float
    label_weight: float


@dataclass(frozen=True, kw_only=True)
class TeachingSettings:
    """Which of a teacher's outputs are learned from, and how much.

    Raises:
        ValueError: ``beta`` with kd.
    """

    #: ``alpha`` where the recipe gives none.
    default_alpha: ClassVar[Mapping[Method, float]] = {"kd": 0.9, "dkd": 1.0, "dist": 1.0}

    method: Annotated[
        Method, "kd: softened outputs; dkd: target and other classes apart; dist: correlations."
    ] = "kd"
    temperature: Annotated[float | None, Gt(0), "Divides the logits; null: 4 for kd and dkd, 1 for dist."] = (
        None
    )
    alpha: Annotated[
        float | None,
        Ge(0),
        "Weight of kd's term (null: 0.9; 1 in qat), dkd's target class (1) or dist's relation among classes (1).",
    ] = None
    beta: Annotated[
        float | None, Ge(0), "Weight of dkd's other classes (null: 2) or dist's relation among images (1)."
    ] = None
    label_weight: Annotated[
        float | None, Ge(0), "Weight of the labels' cross-entropy; null: 1 - alpha for kd, else 1."
    ] = None

    def check_teaching(self) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: see the class.
        """
        if self.method == "kd" and self.beta is not None:
            raise ValueError("beta belongs to dkd and dist; kd has alpha only")

    @property
    def weights(self) -> Weights:
        """Temperature and weights, defaults filled in, as :class:`~deploycnn.training.losses.Distillation` has them."""
        alpha = _given(self.alpha, self.default_alpha[self.method])
        rest = max(0.0, 1 - alpha) if self.method == "kd" else 1.0
        return {
            "temperature": _given(self.temperature, _TEMPERATURE[self.method]),
            "alpha": alpha,
            "beta": _given(self.beta, _BETA[self.method]),
            "label_weight": _given(self.label_weight, rest),
        }


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
