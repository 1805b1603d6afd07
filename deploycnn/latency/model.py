"""What a layer costs at a width: samples measured in whole models, a fit, and its cross-validated error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from deploycnn.core import Json
from deploycnn.errors import ArtifactError
from deploycnn.files import write_json

SCHEMA = 1

FloatArray = npt.NDArray[np.float64]

#: Length scale (in natural logarithms of widths) over which residuals of the fit are alike, and the share of a
#: residual's variance that is taken for noise.
_LENGTH, _NOISE = 0.5, 0.3
#: Parts of the cross-validation.
_FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What layers have in common whose costs go into one table.

    Attributes:
        op: "conv", "transposed" or "linear".
        kernel: (height, width).
        stride: (vertical, horizontal).
        groups: "1", "depthwise" or the number.
        inputs: (height, width) of the input; empty for linear layers.
        outputs: Of the output.
        tail: Operators that the runtime counts with it (fused ones it does not tell).
        widest: (in, out) channels in the dense model.
    """

    op: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tail: tuple[str, ...]
    widest: tuple[int, int]

    @property
    def name(self) -> str:
        """The key in a table, for people too."""
        return " ".join(
            (
                self.op,
                "x".join(map(str, self.kernel)),
                f"stride {'x'.join(map(str, self.stride))}",
                f"groups {self.groups}",
                f"{'x'.join(map(str, self.inputs))}->{'x'.join(map(str, self.outputs))}",
                f"up to {self.widest[0]}->{self.widest[1]}",
                f"[{' '.join(self.tail)}]",
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Measured: a layer of ``kind`` with these widths, in configuration ``config``."""

    kind: str
    width_in: int
    width_out: int
    ms: float
    config: int


@dataclass(frozen=True, slots=True)
class Fit:
    """Cost of one kind: non-negative terms in the widths, times a smooth correction.

    t = (a + b in + c out + d in out) exp(g(ln in, ln out)), where g is the mean of a Gaussian process on the logarithm
    of the residuals (Rasmussen and Williams 2006, eq. 2.25).
    """

    terms: FloatArray
    points: FloatArray
    weights: FloatArray
    offset: float

    def __call__(self, width_in: npt.ArrayLike, width_out: npt.ArrayLike) -> FloatArray:
        """Milliseconds at widths of equal shape."""
        wide = np.stack(
            [np.asarray(width_in, dtype=np.float64).ravel(), np.asarray(width_out, dtype=np.float64).ravel()],
            axis=1,
        )
        base = _terms(wide) @ self.terms
        if len(self.points):
            base = base * np.exp(self.offset + _kernel(np.log(wide), self.points) @ self.weights)
        found: FloatArray = base.reshape(np.shape(width_in))
        return found


def fit(widths: FloatArray, ms: FloatArray) -> Fit:
    """Fit samples of one kind.

    Args:
        widths: (in, out) of each sample, shape (N, 2).
        ms: Shape (N,), above 0.
    """
    terms, _ = nnls(_terms(widths) / ms[:, None], np.ones(len(ms)))
    logs = np.log(ms / np.maximum(_terms(widths) @ terms, 1e-12))
    points, index = np.unique(np.log(widths), axis=0, return_inverse=True)
    counts = np.bincount(index.ravel(), minlength=len(points)).astype(np.float64)
    offset = float(logs.mean())
    means = np.bincount(index.ravel(), weights=logs - offset, minlength=len(points)) / counts
    covariance = _kernel(points, points) + np.diag(_NOISE / counts)
    return Fit(terms, points, np.linalg.solve(covariance, means), offset)  # type: ignore[arg-type] # float64


def _terms(wide: FloatArray) -> FloatArray:
    return np.stack([np.ones(len(wide)), wide[:, 0], wide[:, 1], wide[:, 0] * wide[:, 1]], axis=1)


def _kernel(left: FloatArray, right: FloatArray) -> FloatArray:
    distance = ((left[:, None, :] - right[None, :, :]) ** 2).sum(axis=2)
    found: FloatArray = np.exp(-distance / (2 * _LENGTH**2))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Of predictions of whole models: medians and 95th percentiles of |predicted / measured - 1|."""

    median: float
    p95: float
    models: int


@dataclass(slots=True, kw_only=True)
class LatencyTable:
    """Costs of a target at one setting; what is stored in a file.

    Attributes:
        environment: Of the machine it was measured on (``Environment.to_json``).
        runtime: ``name:mode``.
        precision: Of the graphs: "fp32", "int8", "fp16" or "int8_fp16".
        batch_size: Images per run.
        threads: Of the runtime.
        step: Widths may be rounded up to multiples of this at no cost.
        layers: Key of the table of each layer of the model that it was measured with, by the layer's name.
        overhead_ms: Taken off the profiled time of each node.
        samples: What was measured, by layer.
        error: Of whole models, cross-validated: each was predicted from others. ``None`` until ``judged``.
    """

    environment: Json
    runtime: str
    precision: str
    batch_size: int
    threads: int
    step: int
    layers: Mapping[str, str]
    overhead_ms: float
    samples: tuple[Sample, ...]
    error: Error | None = None
    _fits: dict[str, Fit] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds in it."""
        return tuple(dict.fromkeys(sample.kind for sample in self.samples))

    @property
    def untimed(self) -> tuple[str, ...]:
        """Layers that the runtime told no time of: fused into others, whose times have it."""
        timed = set(self.kinds)
        return tuple(layer for layer, kind in self.layers.items() if kind not in timed)

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the dense model as it was measured: the first configuration.

        Shares are of this, not of what ``cost`` says of the dense widths. They are the corner of all widths, and often
        the ones that kernels were written for: a smooth fit is off there, and with it would be every share.
        """
        return sum(sample.ms for sample in self.samples if sample.config == 0)

    def cost(self, kind: str, width_in: npt.ArrayLike, width_out: npt.ArrayLike) -> FloatArray:
        """Milliseconds of layers of one kind; 0 of those that are ``untimed``.

        Raises:
            ArtifactError: the table lacks this kind.
        """
        if kind not in self._fits:
            chosen = [sample for sample in self.samples if sample.kind == kind]
            if not chosen and kind in self.layers.values():
                return np.zeros(np.shape(width_in))
            if not chosen:
                raise ArtifactError(
                    f'latency table: it has no layer "{kind}"; measure a table with this model: '
                    "deploycnn latency-table MODEL -o table.json"
                )
            self._fits[kind] = _fit_samples(chosen)
        return self._fits[kind](width_in, width_out)

    def judged(self) -> LatencyTable:
        """Fill in the error: of configurations that the fit did not see."""
        predicted = _predicted_sums(self.samples)
        errors = [
            abs(value / sum(sample.ms for sample in self.samples if sample.config == config) - 1)
            for config, value in predicted.items()
        ]
        self.error = Error(
            median=float(np.median(errors)), p95=float(np.percentile(errors, 95)), models=len(errors)
        )
        return self

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "schema_version": SCHEMA,
            "environment": self.environment,
            "runtime": self.runtime,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "step": self.step,
            "error": asdict(self.error) if self.error else None,
            "layers": dict(self.layers),
            "overhead_ms": self.overhead_ms,
            "tables": {
                kind: [
                    [sample.width_in, sample.width_out, round(sample.ms, 6), sample.config]
                    for sample in self.samples
                    if sample.kind == kind
                ]
                for kind in self.kinds
            },
        }

    def save(self, path: Path) -> None:
        """Write the table."""
        write_json(path, self.to_json())


def _fit_samples(samples: Sequence[Sample]) -> Fit:
    widths = np.array([(sample.width_in, sample.width_out) for sample in samples], dtype=np.float64)
    return fit(widths, np.maximum(np.array([sample.ms for sample in samples]), 1e-6))


def _predicted_sums(samples: Sequence[Sample]) -> dict[int, float]:
    """Sum of layers of each configuration, by fits on the other folds of configurations."""
    configs = sorted({sample.config for sample in samples})
    folds = min(_FOLDS, len(configs))
    found = dict.fromkeys(configs, 0.0)
    for fold in range(folds):
        tested = set(configs[fold::folds])
        for kind in dict.fromkeys(sample.kind for sample in samples):
            seen = [s for s in samples if s.kind == kind and s.config not in tested] or [
                s for s in samples if s.kind == kind
            ]
            fitted = _fit_samples(seen)
            for sample in samples:
                if sample.kind == kind and sample.config in tested:
                    found[sample.config] += float(fitted([sample.width_in], [sample.width_out])[0])
    return found
