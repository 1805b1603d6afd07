"""A stopwatch that times the same models once on a machine, so that the same recipe gives the same model there.

What integers make slower, and how narrow a layer must be, is decided by times. Two graphs that are nearly equally fast
trade places from one measurement to the next; the first decision on a machine is kept, as TensorRT keeps timings of
kernels. What a report says is never taken from here: it is measured anew in each run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from deploycnn import cache, environment
from deploycnn.core import Json, Speed, Stopwatch
from deploycnn.files import sha256_of

#: Changes when what is kept means something else.
_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class RememberingStopwatch:
    """``stopwatch``, whose answers are kept in the cache (``$DEPLOYCNN_CACHE/stopwatch``).

    An answer belongs to the bytes of the models, the runtime, the settings and the machine. One that was kept says when
    it was found, in ``Speed.earlier`` and in the log.

    Attributes:
        stopwatch: Asked for what is not kept.
        log: Of the step that asks.
    """

    stopwatch: Stopwatch
    log: logging.Logger

    @property
    def runtime(self) -> str:
        """See ``core.Stopwatch``."""
        return self.stopwatch.runtime

    @property
    def settings(self) -> tuple[tuple[int, int], ...]:
        """See ``core.Stopwatch``."""
        return self.stopwatch.settings

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        """See ``core.Stopwatch.race``."""
        identity = self._identity(
            "race",
            [sha256_of(path) for path in models.values()],
            [batch_size, threads, budget_s],
        )
        stored = cache.load("stopwatch", identity)
        if stored is None:
            speeds = self.stopwatch.race(models, batch_size=batch_size, threads=threads, budget_s=budget_s)
            found = [replace(speeds[name], earlier=_now()) for name in models]
            cache.store("stopwatch", identity, [asdict(speed) for speed in found])
            return {name: speeds[name] for name in models}
        self._tell(f"race of {', '.join(models)}", stored[0]["earlier"])
        return {name: Speed(**speed) for name, speed in zip(models, stored, strict=True)}

    def layer_ms(self, model: Path, *, batch_size: int, threads: int) -> dict[str, float]:
        """See ``core.Stopwatch.layer_ms``."""
        identity = self._identity("layers", [sha256_of(model)], [batch_size, threads])
        stored = cache.load("stopwatch", identity)
        if stored is None:
            times = dict(self.stopwatch.layer_ms(model, batch_size=batch_size, threads=threads))
            if times:
                cache.store("stopwatch", identity, {"ms": times, "when": _now()})
            return times
        self._tell(f"layers of {model.stem}", stored["when"])
        return {str(name): float(ms) for name, ms in stored["ms"].items()}

    def _tell(self, what: str, when: str) -> None:
        self.log.info(
            "%s: %s: timed on %s, and kept in %s", self.runtime, what, when, cache.folder() / "stopwatch"
        )

    def _identity(self, what: str, models: list[str], settings: list[float]) -> str:
        identity: Json = {
            "version": _VERSION,
            "environment": environment.detect().fingerprint,
            "runtime": self.runtime,
            "what": what,
            "models": models,
            "settings": settings,
        }
        return json.dumps(identity, sort_keys=True)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
