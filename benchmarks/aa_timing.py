"""Does the timing tell equal models from a model that is 5% slower?

Three arms, each of ``--pairs`` comparisons, every comparison in a process of its own:

* ``copy``: a file against a byte copy of itself; wanted: indistinguishable (at least 38 of 40);
* ``wait``: the same, but each run of the copy is followed by 5% of its latency spent busy; wanted: slower (at
  least 36 of 40);
* ``layer``: 20 equal convolutions against 21; wanted: slower (at least 36 of 40).

    python benchmarks/aa_timing.py                  # about 18 minutes on a quiet machine
    python benchmarks/aa_timing.py --pairs 4        # a smoke test

Prints one line per comparison and the counts; writes everything to ``--output``.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploycnn import environment
from deploycnn.core import Artifact, Facts, TensorSpec
from deploycnn.profiling import statistics
from deploycnn.profiling.timing import Candidate, TimingSettings, time_interleaved
from deploycnn.runtimes.base import Executed, Session, create

WANTED = {"copy": ("indistinguishable", 38), "wait": ("slower", 36), "layer": ("slower", 36)}
LAYERS, CHANNELS, SIZE = 20, 32, 32
SLOWDOWN = 0.05


class Waiting(Session):
    """A session whose timed call takes ``extra_s`` longer, spent in a loop as arithmetic would be."""

    def __init__(self, session: Session, extra_s: float) -> None:
        self._session = session
        self._extra_s = extra_s

    @property
    def executed(self) -> Executed:  # type: ignore[override]
        """Of the session inside."""
        return self._session.executed

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Of the session inside."""
        return self._session.run(images_NCHW)

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], None]:
        """The call of the session inside, and the wait."""
        call, extra_s, clock = self._session.bind(images_NCHW), self._extra_s, time.perf_counter

        def slower() -> None:
            call()
            until = clock() + extra_s
            while clock() < until:
                pass

        return slower

    def close(self) -> None:
        """Close the session inside."""
        self._session.close()


def write_model(path: Path, layers: int) -> None:
    """A chain of equal 3x3 convolutions with ReLU, and a classifier; random weights that keep the scale."""
    generator = np.random.default_rng(0)
    nodes, weights, current = [], [], "images"
    for index in range(layers):
        inputs = 3 if index == 0 else CHANNELS
        kernel = generator.standard_normal((CHANNELS, inputs, 3, 3)) * (2 / (9 * inputs)) ** 0.5
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"weight{index}"))
        nodes.append(
            helper.make_node("Conv", [current, f"weight{index}"], [f"conv{index}"], pads=[1, 1, 1, 1])
        )
        nodes.append(helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"]))
        current = f"relu{index}"
    head = generator.standard_normal((CHANNELS, 10)).astype(np.float32)
    weights.append(numpy_helper.from_array(head, "head"))
    nodes += [
        helper.make_node("GlobalAveragePool", [current], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def artifact(path: Path) -> Artifact:
    """The file, as runtimes take it."""
    spec = TensorSpec(name="images", dtype="float32", shape=(None, 3, SIZE, SIZE))
    return Artifact(
        key=path.stem, format="onnx", path=path, inputs=(spec,), outputs=(), parents=(), facts=Facts()
    )


def compare_once(arm: str, runtime: str, threads: int, budget_s: float, seed: int) -> dict[str, Any]:
    """One comparison, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first.onnx", Path(folder) / "second.onnx"
        write_model(first, LAYERS)
        if arm == "layer":
            write_model(second, LAYERS + 1)
        else:
            shutil.copyfile(first, second)
        opened = create(runtime)
        images = np.random.default_rng(seed).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)

        def open_first() -> Session:
            return opened.open(artifact(first), batch_size=1, threads=threads)

        def open_second() -> Session:
            session = opened.open(artifact(second), batch_size=1, threads=threads)
            return Waiting(session, extra_s) if arm == "wait" else session

        extra_s = SLOWDOWN * latency_s(open_first(), images) if arm == "wait" else 0.0
        candidates = [
            Candidate(
                label=label, runtime=runtime, batch_size=1, threads=threads, images_NCHW=images, open=opener
            )
            for label, opener in (("first", open_first), ("second", open_second))
        ]
        started = time.perf_counter()
        rows = time_interleaved(candidates, TimingSettings(budget_s=budget_s, seed=seed))
        wall_s = time.perf_counter() - started
    ratio = statistics.compare(rows[0], rows[1])
    disturbance = rows[0].disturbance
    return {
        "arm": arm, "threads": threads, "seed": seed, "wall_s": wall_s,
        "median_ms": statistics.summarize(rows[0]).median_ms,
        "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "verdict": ratio.verdict,
        "rounds": len(rows[0].samples_ms), "disturbance": disturbance and disturbance.to_json(),
    }  # fmt: skip


def latency_s(session: Session, images: npt.NDArray[np.float32]) -> float:
    """Median of 200 runs after 50."""
    call = session.bind(images)
    samples = []
    for _ in range(250):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    session.close()
    return float(np.median(samples[50:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--arms", default="copy,wait,layer")
    parser.add_argument("--runtime", default="onnxruntime:cpu")
    parser.add_argument("--threads", default="1,all", help="comma-separated; comparisons take turns")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per candidate")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("ARM", "THREADS", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        arm, threads, seed = options.one
        print(json.dumps(compare_once(arm, options.runtime, int(threads), options.budget, int(seed))))
        return
    here = environment.detect()
    counts = [here.threads if item == "all" else int(item) for item in options.threads.split(",")]
    results = []
    # the arms take turns, so that a noisy quarter of an hour hits all of them
    for seed in range(options.pairs):
        for arm in options.arms.split(","):
            command = [
                sys.executable,
                __file__,
                "--runtime",
                options.runtime,
                "--budget",
                str(options.budget),
            ]
            command += ["--one", arm, str(counts[seed % len(counts)]), str(seed)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            results.append(result)
            print(
                f"{seed:3} {arm:5} t{result['threads']} {result['median_ms']:.3f} ms  "
                f"ratio {result['ratio']:.4f} [{result['low']:.4f}, {result['high']:.4f}]  "
                f"{result['verdict']}  {result['wall_s']:.1f} s",
                flush=True,
            )
    report = {"environment": here.to_json(), "runtime": options.runtime, "budget_s": options.budget}
    report["counts"] = {}
    for arm in options.arms.split(","):
        verdict, needed = WANTED[arm]
        hits = sum(result["arm"] == arm and result["verdict"] == verdict for result in results)
        report["counts"][arm] = {"wanted": verdict, "hits": hits, "pairs": options.pairs}
        print(f"{arm}: {hits} of {options.pairs} {verdict} (wanted: at least {needed} of 40)")
    slug = re.sub(r"[^a-z0-9]+", "-", here.cpu.lower()).strip("-")
    month = dt.datetime.now(dt.UTC).strftime("%Y%m")
    output = options.output or Path(__file__).parent / f"aa_timing_{slug}_{month}.json"
    output.write_text(json.dumps({**report, "results": results}, indent=1))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
