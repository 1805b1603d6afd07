"""The remedies of the repair ladder, each from a candidate to a better one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from deploycnn.quantization.engine import Candidate, Engine
from deploycnn.quantization.types import Calibrator

#: From a candidate to a better one.
Remedy = Callable[[Candidate], Candidate]

#: Told of the share done, and what is being done.
Tell = Callable[[float, float, str], None]

#: Images that rounding is learned on, at most: more cost memory and time and change little.
ADAROUND_IMAGES = 256


def remedies(engine: Engine, *, seed: int, tell: Tell) -> Mapping[str, Remedy]:
    """By the names that recipes and the report's ladder use.

    Args:
        engine: Builds the candidates.
        seed: Of what is learned.
        tell: Told of the share done, and what is being done.
    """
    return {
        "percentile": choose("percentile"),
        "mse": choose("mse"),
        "equalize": lambda best: _equalize(best, engine, tell),
        "absorb_bias": lambda best: _absorb(best, engine, tell),
        "correct_bias": lambda best: _correct(best, engine),
        "adaround": lambda best: _adaround(best, engine, seed, tell),
    }


def choose(name: Calibrator) -> Remedy:
    """The remedy of choosing ranges otherwise."""
    return lambda best: replace(best, calibrator=name)


def _equalize(best: Candidate, engine: Engine, tell: Tell) -> Candidate:
    from deploycnn.quantization.equalization import equalize

    model = equalize(
        best.model, engine.images(), threads=engine.threads, progress=_counted(tell, "equalizing channels")
    )
    return replace(best, model=model, weights={}, shifts={})


def _absorb(best: Candidate, engine: Engine, tell: Tell) -> Candidate:
    from deploycnn.quantization.bias_absorption import absorb_high_biases

    model = absorb_high_biases(
        best.model, engine.images(), threads=engine.threads, progress=_counted(tell, "absorbing high biases")
    )
    return replace(best, model=model, weights={}, shifts={})


def _correct(best: Candidate, engine: Engine) -> Candidate:
    from deploycnn.quantization.bias_correction import bias_shifts

    shifts = bias_shifts(
        best.model,
        engine.plan(best),
        engine.mean_maps(best),
        weights=best.weights or None,
    )
    return replace(best, shifts=shifts)


def _counted(tell: Tell, what: str) -> Callable[[int], None]:
    return lambda done: tell(0, 1, f"{what}: {done} images")


def _adaround(best: Candidate, engine: Engine, seed: int, tell: Tell) -> Candidate:
    from deploycnn.quantization.adaround import adaround
    from deploycnn.quantization.rounding import Settings

    plan = engine.plan(best)
    rounded = adaround(
        best.model,
        engine.build(replace(best, weights={}, shifts={})),
        first_images(engine, ADAROUND_IMAGES),
        Settings(threads=engine.threads, seed=seed),
        bounds={item.initializer: (item.number.qmin, item.number.qmax) for item in plan.weights},
        progress=lambda done, total: tell(done, total, "learning to round"),
    )
    # Learned with the layers before it as they are rounded, it makes up for their shifts, and its own are others.
    return replace(best, weights=rounded.weights, shifts={})


def first_images(engine: Engine, count: int) -> npt.NDArray[np.float32]:
    """The first calibration images as one batch."""
    held: list[npt.NDArray[np.float32]] = []
    for batch in engine.images():
        held.append(batch[: count - sum(len(other) for other in held)])
        if sum(len(other) for other in held) >= count:
            break
    return np.concatenate(held)
