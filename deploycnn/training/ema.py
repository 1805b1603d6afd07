"""An exponential moving average of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """``average = d * average + (1 - d) * weights`` after each step, with d rising to ``decay``.

    Polyak & Juditsky 1992; the warm-up ``d = min(decay, (1 + step) / (10 + step))``, which is TensorFlow's, keeps a
    short training from remembering where it started: the average reaches back over about a tenth of the steps
    taken until ``decay`` takes over. Running means and variances of batch norms are averaged like the weights
    that they belong to (Tan & Le 2019 have it so); counters and other integers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the present weights of ``model``, which must not be replaced, only changed."""
        self.model, self.decay, self.steps = model, decay, 0
        live = model.state_dict()
        self.average = {name: tensor.clone() for name, tensor in live.items()}
        floats = [name for name, tensor in live.items() if tensor.is_floating_point()]
        self._pairs = [self.average[name] for name in floats], [live[name] for name in floats]
        self._copied = [(self.average[name], live[name]) for name in live if name not in set(floats)]

    def update(self) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        averages, weights = self._pairs
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)
            for average, value in self._copied:
                average.copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averaged weights, then its own again."""
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def to_state(self) -> dict[str, object]:
        """Tensors and plain values."""
        return {"steps": self.steps, "average": self.average}

    def load(self, steps: int, average: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`to_state`, in place."""
        self.steps = steps
        for name, tensor in average.items():
            self.average[name].copy_(tensor)
