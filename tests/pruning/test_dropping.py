"""Whole blocks beside widths: their ranking, their place in the solver's problem, and what is chosen."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from deploycnn.core import Context, Json, Speed
from deploycnn.errors import PassRequirementError, RecipeError
from deploycnn.latency.goal import latency_goal
from deploycnn.models import delta
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.passes.prune import Prune
from deploycnn.pruning import importance
from deploycnn.pruning.allocation import chosen, ladders, losses_of
from deploycnn.pruning.blocks import droppable
from deploycnn.pruning.budget import problem
from deploycnn.pruning.choices import Choice, best
from deploycnn.pruning.dropping import Block, Dropping, rank, ranked_blocks
from deploycnn.pruning.latency_goal import LatencyGoal
from deploycnn.pruning.layers import MIXING, width
from deploycnn.pruning.pruner import Goal, prune
from deploycnn.pruning.solver import Solution, integer_optimum, solve
from deploycnn.pruning.structure import analyse
from deploycnn.pruning.surgery import removals, remove
from tests.pruning import nets
from tests.pruning.test_latency_goal import Exact


def some_net(depth: int = 14) -> nn.Module:
    """Whose answers are of a usual size."""
    torch.manual_seed(0)
    model = nets.lively(CifarResNet(depth)).eval()
    with torch.no_grad():
        model.linear.weight *= 4 / model(nets.images(32, count=12)).std()
    return model


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Twelve images of the classes that the net sees in them, so that it has something to lose."""
    images = nets.images(32, count=12)
    with torch.no_grad():
        labels = some_net()(images).argmax(1)
    return list(zip(images.split(6), labels.split(6), strict=True))


def loss(model: nn.Module, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    with torch.no_grad():
        sums = [float(functional.cross_entropy(model(x), y, reduction="sum")) for x, y in seen]
    return sum(sums) / sum(len(x) for x, _ in seen)


def as_block(model: nn.Module, name: str, missed: float) -> Block:
    inside = {item for item, layer in model.named_modules() if isinstance(layer, MIXING)}
    layers = frozenset(item for item in inside if item.startswith(name + "."))
    return Block(name=name, layers=layers, rise=missed, loss=missed)


def test_a_blocks_loss_is_what_it_adds_to_those_before_it_and_never_falls() -> None:
    model, seen = some_net(), batches()
    before = copy.deepcopy(model.state_dict())
    found = rank(model, nets.images(32), lambda: seen)
    assert {block.name for block in found.blocks} <= set(droppable(model, nets.images(32)))
    twin, base = copy.deepcopy(model), loss(model, seen)
    last, most = base, 0.0
    for block in found.blocks:
        delta.drop(twin, (block.name,))
        now = loss(twin, seen)
        most = max(most * 1.001, now - last, 1e-3)
        assert block.rise == pytest.approx(now - base, abs=1e-5)
        assert block.loss == pytest.approx(most, abs=1e-5)
        assert block.layers == {f"{block.name}.conv1", f"{block.name}.conv2"}
        last = now
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ranking_ends_where_the_loss_is_that_of_a_guess() -> None:
    model, seen = some_net(), batches()
    found = rank(model, nets.images(32), lambda: seen)
    assert 1 <= len(found.blocks) < 4
    delta.drop(model, [block.name for block in found.blocks])
    assert loss(model, seen) <= np.log(10)
    left = droppable(model, nets.images(32))
    assert left
    for name in left:
        twin = copy.deepcopy(model)
        delta.drop(twin, (name,))
        assert loss(twin, seen) > np.log(10)


def test_modules_that_are_kept_keep_their_blocks() -> None:
    seen = batches()
    for keep, gone in (
        (("layer1.0.conv1",), {"layer1.0"}),
        (("layer1",), {"layer1.0", "layer1.1"}),
        (("conv1",), set()),
    ):
        found = rank(some_net(), nets.images(32), lambda: seen, keep=keep)
        names = {block.name for block in found.blocks}
        assert not gone & names
        assert names or gone
    kept = rank(some_net(8), nets.images(32), lambda: seen, keep=("layer1",))
    assert kept.blocks == ()
    assert kept.why == "`protect` and `ratios` keep all its residual blocks"


def test_the_judge_uses_the_statistics_of_what_it_sees() -> None:
    """As surgery leaves statistics that belong to the old activations."""
    model, seen = some_net(), batches()
    found = rank(model, nets.images(32), lambda: seen)
    expected = 0.0
    for images, labels in seen:
        twin = copy.deepcopy(model)
        for layer in twin.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        expected += len(images) * loss(twin, [(images, labels)]) / 12
    spoilt = copy.deepcopy(model)
    for layer in spoilt.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(3.0)
    assert found.judge(copy.deepcopy(model)) == pytest.approx(expected, rel=1e-5)
    assert found.judge(spoilt) == pytest.approx(expected, rel=1e-5)
    assert loss(model, seen) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_problems_cost_is_that_of_the_layers_that_are_left(seed: int) -> None:
    model = some_net()
    groups = analyse(model, nets.images(32)).groups
    found = ladders(
        groups,
        importance.random(model, groups, seed=seed),
        round_to=4,
        max_ratio=0.8,
        ratios=[None] * len(groups),
    )
    blocks = [as_block(model, name, 1.0) for name in droppable(model, nets.images(32))]
    names = [name for name, layer in model.named_modules() if isinstance(layer, MIXING)]

    def cost(layer: str, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        return 7.0 + len(layer) * inputs * outputs

    posed = problem(
        model,
        names,
        groups,
        found,
        [*losses_of(found), *(block.losses for block in blocks)],
        cost,
        fixed=2.0,
        blocks=[block.layers for block in blocks],
    )
    random = np.random.default_rng(seed)
    levels = [int(random.integers(len(each))) for each in posed.losses]
    steps = [ladder.steps[level] for ladder, level in zip(found, levels, strict=False)]
    gone = [block.name for block, level in zip(blocks, levels[len(found) :], strict=True) if level]
    remove(model, removals(chosen(groups, found, steps)))
    delta.drop(model, gone)
    left = [
        float(cost(name, np.array(width(layer, "in")), np.array(width(layer, "out"))))
        for name, layer in model.named_modules()
        if isinstance(layer, MIXING)
    ]
    assert posed.cost(levels) == pytest.approx(2.0 + sum(left))
    dense = posed.cost([0] * len(posed.losses))
    for ratio in (0.7, 0.4):
        solved, exact = solve(posed, ratio * dense), integer_optimum(posed, ratio * dense, seconds=20)
        assert solved is not None
        assert exact is not None
        assert solved.cost <= ratio * dense * (1 + 1e-9)
        assert solved.loss <= exact.loss * 1.001
        assert solved.bound <= exact.loss + 1e-6


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deploycnn.latency.samples.CONFIGS", 12)


def goal_of(
    model: nn.Module, ratio: float, dropping: Dropping, folder: Path, stopwatch: Exact | None = None
) -> LatencyGoal:
    goal = latency_goal(
        model,
        torch.randn(2, 3, 32, 32),
        ratio=ratio,
        precision="fp32",
        table=None,
        ctx=Context(output=folder, scratch=folder, stopwatch=stopwatch or Exact()),
    )
    goal.dropping = dropping
    return goal


def pruned(model: nn.Module, goal: LatencyGoal, round_to: int) -> Json:
    return prune(
        model,
        torch.randn(2, 3, 32, 32),
        lambda model, groups: importance.magnitude(model, groups, power=2),
        Goal(latency=goal, round_to=round_to),
    )


@pytest.mark.usefixtures("_cache")
def test_a_goal_is_reached_with_the_choice_that_the_judge_likes_best(tmp_path: Path) -> None:
    model = some_net()
    images = torch.randn(2, 3, 32, 32)
    blocks = tuple(as_block(model, name, 0.1) for name in droppable(model, images))
    judged: list[int] = []

    def judge(net: nn.Module) -> float:
        gone = sum(isinstance(module, delta.Dropped) for module in net.modules())
        judged.append(gone)
        return abs(gone - 2.0)

    goal = goal_of(model, 0.5, Dropping(blocks=blocks, judge=judge), tmp_path)
    dense = copy.deepcopy(model)
    record = pruned(model, goal, 4)["latency"]
    assert 0 in judged or 1 in judged
    assert max(judged) > 2
    assert len(record["dropped_blocks"]) == 2
    assert record["measured_ratio"] == pytest.approx(0.5, rel=0.03)
    assert record["predicted_ratio"] == pytest.approx(0.5, rel=0.03)
    gone = [name for name, module in model.named_modules() if isinstance(module, delta.Dropped)]
    assert sorted(gone) == sorted(record["dropped_blocks"])
    rows = {row["layer"]: row for row in record["layers"]}
    for name in gone:
        assert rows[f"{name}.conv1"]["out"][1] == 0
        assert rows[f"{name}.conv1"]["ms"][1] == 0.0
    ranked, offered, _ = goal.tables()
    assert [row[2] for row in ranked["rows"]] == [block.name in gone for block in blocks]
    kept = [row for row in offered["rows"] if row[-1]]
    assert kept == [[2, kept[0][1], record["predicted_ratio"], record["training_loss"], True]]
    assert len(offered["rows"]) > 3
    # Blocks and widths come back together, bit for bit.
    delta.apply(
        delta.Delta.from_json(delta.difference(model, copy.deepcopy(dense)).to_json()),
        rebuilt := copy.deepcopy(dense),
        dict(model.state_dict()),
    )
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(images), model.eval()(images))


@pytest.mark.usefixtures("_cache")
def test_what_was_measured_to_be_too_slow_gives_way_to_another_choice(tmp_path: Path) -> None:
    """Though the judge likes it best."""

    class Slow(Exact):
        """On which a net without two of its blocks is slower than the sum of its layers."""

        def race(
            self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
        ) -> dict[str, Speed]:
            found = super().race(models, batch_size=batch_size, threads=threads, budget_s=budget_s)
            convolutions = [
                sum(node.op_type == "Conv" for node in onnx.load(path).graph.node) for path in models.values()
            ]
            if "pruned" in models and convolutions == [13, 9]:
                ratio = found["pruned"].ratio / 1.25
                found["pruned"] = Speed(median_ms=1.0, ratio=ratio, low=ratio, high=ratio)
            return found

    model, images = some_net(), torch.randn(2, 3, 32, 32)
    blocks = tuple(as_block(model, name, 0.1) for name in droppable(model, images))

    def judge(net: nn.Module) -> float:
        return 1 + abs(sum(isinstance(module, delta.Dropped) for module in net.modules()) - 2.0)

    goal = goal_of(model, 0.7, Dropping(blocks=blocks, judge=judge), tmp_path, Slow())
    record = pruned(model, goal, 64)["latency"]
    assert len(record["tried"][0]["dropped_blocks"]) == 2
    assert record["met"]
    assert record["measured_ratio"] <= 0.7
    assert len(record["dropped_blocks"]) != 2


@pytest.mark.usefixtures("_cache")
def test_blocks_can_reach_a_goal_where_no_width_can_change(tmp_path: Path) -> None:
    """Of 16 to 64 channels none is left at multiples of 64."""
    model, images = some_net(), torch.randn(2, 3, 32, 32)
    blocks = tuple(as_block(model, name, 0.1) for name in droppable(model, images))
    goal = goal_of(model, 0.8, Dropping(blocks=blocks, judge=lambda _: 1.0), tmp_path)
    record = pruned(model, goal, 64)
    assert record["latency"]["met"]
    assert record["latency"]["measured_ratio"] <= 0.8
    assert record["latency"]["dropped_blocks"]
    assert 0 < record["pruning_ratio"] < 1
    assert record["widths"] == {}


def offer(loss: float, predicted: float) -> Choice:
    return Choice(
        steps=(),
        dropped=(),
        solution=Solution(levels=(), loss=0.0, cost=0.0, bound=0.0),
        predicted=predicted,
        channels=0,
        judged=loss,
    )


def test_of_choices_that_the_judge_cannot_tell_apart_the_largest_is_kept() -> None:
    offers = [offer(1.0, 0.40), offer(1.03, 0.485), offer(1.04, 0.486), offer(1.04, 0.45), offer(1.2, 0.50)]
    assert best(offers) is offers[1]
    assert best(offers[:1]) is offers[0]


def test_a_block_goes_where_the_loss_does_not_rise_though_the_net_only_guesses() -> None:
    model, seen = some_net(), batches()
    with torch.no_grad():
        model.linear.weight *= -1
    assert loss(model, seen) > np.log(10)
    found = rank(model, nets.images(32), lambda: seen)
    assert found.blocks[0].rise <= 0
    assert found.why == ""


def test_where_every_block_is_needed_the_reason_is_told(tmp_path: Path) -> None:
    model, images = some_net(), nets.images(32, count=12)
    with torch.no_grad():
        for name in droppable(model, nets.images(32)):
            model.get_submodule(f"{name}.bn2").weight *= 100  # so that much goes with a block
        model.linear.weight *= 60 / model(images).std()
        seen = [(images, model(images).argmax(1))]
    found = rank(model, nets.images(32), lambda: seen)
    assert found.blocks == ()
    assert found.why == "without any of its 4 blocks the model does no better than a guess"
    goal = goal_of(model, 0.01, found, tmp_path)
    with pytest.raises(
        PassRequirementError, match="no block can go, as without any of its 4 blocks"
    ) as error:
        pruned(model, goal, 8)
    assert "drop_blocks: true" not in str(error.value)


def test_at_the_middle_rate_all_blocks_and_all_channels_weigh_the_same() -> None:
    blocks = tuple(Block(name=str(i), layers=frozenset(), rise=0.5, loss=0.5) for i in range(4))
    dropping = Dropping(blocks=blocks, judge=lambda _: 0.0)
    assert dropping.rate([np.array([0.0, 1.0, 4.0]), np.array([0.0, 6.0])]) == pytest.approx(2.0 / 10.0)
    assert dropping.names([5, 2, 0, 1, 0, 1]) == ("1", "3")


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match="drop_blocks is for latency_ratio"):
        Prune(macs_ratio=0.5, drop_blocks=True)
    assert Prune(latency_ratio=0.5, drop_blocks=True).needs_data
    assert not Prune(latency_ratio=0.5).needs_data


def test_ranking_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match=r"drop_blocks: ranking blocks needs images.*no `data`"):
        ranked_blocks(
            some_net(),
            nets.images(32),
            protect=(),
            ratios=(),
            limit=8,
            ctx=Context(output=tmp_path, scratch=tmp_path),
        )
