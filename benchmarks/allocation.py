"""Where channels are taken from: top-1 before recovery at equal predicted latency, by the solver and by two habits.

    python benchmarks/allocation.py --data cifar10-jpeg.zip --net resnet56 --weights resnet56.safetensors \
        --goals 0.9 0.8 0.7 0.6 0.5 --out allocation.jsonl

"uniform" takes the same share of every layer, "global" the channels of least importance of all layers; each goes just
as far as the goal, in the hardware's steps. The solver then gets exactly the latency that is predicted for it, so that
nobody has a step more. ``--importance`` ranks channels for all alike; ``magnitude`` is what such tools do by default.
Top-1 is of val (the last 500 images of each training class), as cut, and with batch norms re-estimated on
``--bn-images`` training images, which is what recovery begins with. Predictions are of a table of this machine,
measured on the first run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from training_runs import Bench as Runs
from training_runs import add_arguments, part

from deploycnn.core import Context
from deploycnn.data.loader import batches
from deploycnn.latency.measure import Bench
from deploycnn.latency.model import LatencyTable
from deploycnn.models.artifact import load_model
from deploycnn.profiling.stopwatch import RuntimeStopwatch
from deploycnn.pruning.allocation import Ladder, allocate, ladders
from deploycnn.pruning.criteria import criterion
from deploycnn.pruning.elimination import Problem
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.importance import Scores
from deploycnn.pruning.latency_problem import cut, draw, posed_problem
from deploycnn.pruning.solver import solve
from deploycnn.pruning.structure import analyse, shrunk
from deploycnn.sources.zoo import Zoo
from deploycnn.training.batchnorm import reestimate
from deploycnn.training.evaluate import evaluate

#: Shares of channels to remove that are tried.
SHARES = [step / 1000 for step in range(1000)]


def levels_of(found: Sequence[Ladder], steps: Sequence[int]) -> list[int]:
    """Positions of steps in their ladders."""
    return [ladder.steps.index(step) for ladder, step in zip(found, steps, strict=True)]


def habit(found: Sequence[Ladder], posed: Problem, scope: str, limit: float) -> list[int] | None:
    """Steps of the least share of channels whose predicted cost is within ``limit``."""
    for share in SHARES:
        steps = allocate(found, share, "layer" if scope == "uniform" else "global")
        if posed.cost(levels_of(found, steps)) <= limit:
            return steps
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--net", default="resnet56")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--goals", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--importance", nargs="+", default=["magnitude", "taylor"])
    parser.add_argument("--importance-images", type=int, default=1024)
    parser.add_argument("--bn-images", type=int, default=2048)
    given = parser.parse_args()
    runs = Runs(given)
    shape = (3, 32, 32)
    net = load_model(runs.make("dense", Zoo(name=given.net, weights=given.weights)).path).eval()
    images = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    bench = Bench(
        model=net,
        images=images,
        stopwatch=RuntimeStopwatch(runtime="onnxruntime:cpu", image_shape=shape),
        precision="fp32",
        batch_size=1,
        threads=1,
        target="onnxruntime-cpu",
    )
    groups = analyse(net, shrunk(net, images)).groups
    ctx = Context(output=runs.folder, scratch=runs.folder, data=runs.data, threads=given.threads)
    torch.set_num_threads(given.threads)

    def told(way: str, importance: str, goal: float, found: Sequence[Ladder], steps: Sequence[int]) -> None:
        pruned = cut(net, groups, found, steps, ())
        raw, norms = scores(runs, pruned, given.bn_images)
        runs.tell(
            way=way,
            importance=importance,
            goal=goal,
            predicted=round(posed.cost(levels_of(found, steps)) / table.dense_ms, 4),
            val_top1=raw,
            val_top1_bn=norms,
        )

    for importance in given.importance:
        rank = criterion(importance, norm="l2", images=given.importance_images, ctx=ctx)
        found, table = climbed(bench, groups, rank(net, groups))
        posed = posed_problem(net, bench.layers(), groups, found, table)
        if importance == given.importance[0]:
            told("dense", "", 1.0, found, [0] * len(found))
        for goal in given.goals:
            for scope in ("uniform", "global"):
                steps = habit(found, posed, scope, goal * table.dense_ms)
                if steps is None:
                    runs.tell(way=scope, importance=importance, goal=goal, out_of_reach=True)
                    continue
                told(scope, importance, goal, found, steps)
                solution = solve(posed, posed.cost(levels_of(found, steps)) * (1 + 1e-9))
                assert solution is not None, "what was found by habit is a solution"
                ours = [ladder.steps[level] for ladder, level in zip(found, solution.levels, strict=True)]
                told(f"solver at the latency of {scope}", importance, goal, found, ours)


def climbed(
    bench: Bench, groups: Sequence[ChannelGroup], scored: Sequence[Scores]
) -> tuple[list[Ladder], LatencyTable]:
    """Ladders by some importance, and the table, which does not depend on it."""
    found = ladders(groups, scored, round_to=bench.step(), max_ratio=0.9, ratios=[None] * len(groups))
    return found, bench.table(lambda generator: draw(groups, found, generator))


def scores(runs: Runs, model: nn.Module, images: int) -> tuple[float, float]:
    """Top-1 on val as the model is, and with its batch norms re-estimated."""

    def top1() -> float:
        model.eval()
        return evaluate(
            model, runs.data.dataset.val, runs.data.preprocessing, batch_size=256, device="cpu"
        ).top1

    raw = top1()
    reestimate(model, training_images(runs, images))
    return raw, top1()


def training_images(runs: Runs, count: int) -> list[Tensor]:
    """Batches of training images, evenly over the classes, each of all classes."""
    split = part(runs.data.dataset.train, count)
    order = np.random.default_rng(0).permutation(len(split))
    return [
        torch.from_numpy(batch.images)
        for batch in batches(split, runs.data.preprocessing, 128, indices=order)
    ]


if __name__ == "__main__":
    main()
