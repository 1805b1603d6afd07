"""How many channels go, and which."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycnn.pruning.allocation import (
    Ladder,
    allocate,
    chosen,
    give_back,
    ladders,
    ratio_for_macs,
    ratios_of,
)
from deploycnn.pruning.groups import ChannelGroup, Unit


def group(name: str, width: int, tied: int = 1) -> ChannelGroup:
    atoms = np.arange(width).reshape(tied, -1).T
    return ChannelGroup(name=name, width=width, members=(), units=(Unit(atoms=atoms),), producers=(name,))


def climb(
    widths: list[int], scores: list[np.ndarray], *, round_to: int = 8, max_ratio: float = 0.9, tied: int = 1
) -> tuple[list[ChannelGroup], list[Ladder]]:
    groups = [group(f"layer{index}", width, tied) for index, width in enumerate(widths)]
    found = ladders(groups, scores, round_to=round_to, max_ratio=max_ratio, ratios=[None] * len(groups))
    return groups, found


def random_scores(widths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(width) + 0.1 for width in widths]


@pytest.mark.parametrize(
    ("width", "ratio", "left"),
    [
        (64, 0.3, 48),  # 44.8 is nearer to 48 than to 40
        (16, 0.3, 8),  # 11.2
        (16, 0.25, 16),  # 12 is as near to 8: fewer channels go
        (24, 0.3, 16),
        (8, 0.5, 8),  # nothing below one multiple
        (20, 0.3, 16),  # no multiple itself
        (20, 0.05, 20),
        (1000, 0.5, 504),  # 500 is as near to 496
        (64, 0.9, 8),
    ],
)
def test_layer_scope_takes_the_nearest_multiple(width: int, ratio: float, left: int) -> None:
    _, found = climb([width], random_scores([width]))
    assert width - allocate(found, ratio, "layer")[0] == left


def test_least_important_channels_go_first() -> None:
    scores = [np.array([5.0, 1.0, 4.0, 2.0, 3.0, 0.5, 6.0, 7.0])]
    groups, found = climb([8], scores, round_to=1)
    ((_, lost),) = chosen(groups, found, allocate(found, 0.5, "layer"))
    assert lost.tolist() == [1, 3, 4, 5]


def test_equal_scores_fall_in_order() -> None:
    groups, found = climb([16], [np.ones(16)])
    ((_, lost),) = chosen(groups, found, allocate(found, 0.5, "layer"))
    assert lost.tolist() == list(range(8))


def test_tied_channels_fall_together() -> None:
    groups, found = climb([32], [np.tile(np.arange(8.0), 4)], tied=4)
    ((_, lost),) = chosen(groups, found, allocate(found, 0.25, "layer"))
    assert lost.tolist() == sorted(place + 8 * part for place in (0, 1) for part in range(4))


def test_odd_ties_keep_the_width_a_multiple() -> None:
    # 3 channels fall together, so a width that is a multiple of 8 needs 8 of these at a time.
    _, found = climb([96], random_scores([96]), tied=3)
    assert found[0].steps == (0, 8, 16, 24)


@pytest.mark.parametrize("max_ratio", [0.3, 0.5, 0.9])
def test_no_layer_loses_more_than_allowed(max_ratio: float) -> None:
    widths = [16, 64, 96, 20]
    scores = [np.full(width, 1.0) for width in widths]
    scores[1] = np.concatenate([np.full(63, 1e-6), [1.0]])
    _, found = climb(widths, scores, max_ratio=max_ratio)
    for scope in ("layer", "global"):
        steps = allocate(found, max_ratio, scope)
        for width, step in zip(widths, steps, strict=True):
            assert step <= width * max_ratio + 1e-9
            assert width - step >= 8


def test_exactly_the_allowed_share_may_go() -> None:
    _, found = climb([10], random_scores([10]), round_to=1, max_ratio=0.3)
    assert found[0].steps == (0, 1, 2, 3)


def test_global_scope_compares_layers_by_their_own_mean() -> None:
    # Half of the first layer is unimportant, whatever its scale; all of the second is alike.
    scores = [1e6 * np.repeat([0.1, 1.9], 8), np.ones(16)]
    _, found = climb([16, 16], scores)
    assert allocate(found, 0.25, "global") == [8, 0]


@given(
    widths=st.lists(st.integers(8, 48), min_size=1, max_size=3),
    ratio=st.floats(0.0, 0.95),
    seed=st.integers(0, 1000),
)
def test_global_scope_is_the_cheapest_choice_of_its_size(widths: list[int], ratio: float, seed: int) -> None:
    """By brute force over all widths: none removes as many channels of less importance."""
    _, found = climb(widths, random_scores(widths, seed))

    def cost(steps: tuple[int, ...]) -> float:
        # Importance per block of channels, as blocks are what is compared.
        return sum(
            float(ladder.importance[low:high].mean())
            for ladder, step in zip(found, steps, strict=True)
            for low, high in itertools.pairwise(ladder.steps)
            if high <= step
        )

    steps = tuple(allocate(found, ratio, "global"))
    blocks = sum(ladder.steps.index(step) for ladder, step in zip(found, steps, strict=True))
    rivals = itertools.product(*(ladder.steps for ladder in found))
    same = [
        r for r in rivals if sum(ladder.steps.index(s) for ladder, s in zip(found, r, strict=True)) == blocks
    ]
    assert cost(steps) <= min(map(cost, same)) + 1e-12
    # And its size is the one asked for, within half a block, or all that may go.
    most = sum(ladder.steps[-1] for ladder in found)
    assert abs(sum(steps) - min(ratio * sum(widths), most)) <= 8


@given(
    widths=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    ratios=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
    scope=st.sampled_from(["layer", "global"]),
    round_to=st.sampled_from([1, 2, 8, 16]),
    seed=st.integers(0, 100),
)
def test_more_is_never_less(
    widths: list[int], ratios: tuple[float, float], scope: str, round_to: int, seed: int
) -> None:
    _, found = climb(widths, random_scores(widths, seed), round_to=round_to)
    less, more = (allocate(found, ratio, scope) for ratio in sorted(ratios))
    assert all(a <= b for a, b in zip(less, more, strict=True))
    for width, step in zip(widths, more, strict=True):
        assert step == 0 or ((width - step) % round_to == 0 and width - step >= round_to)


def test_named_ratios_win_over_the_general_one() -> None:
    groups = [
        group("layer1.0.conv1", 64),
        group("layer1.1.conv1", 64),
        group("layer10", 64),
        group("stem", 64),
    ]
    wanted = {"layer1": 0.25, "layer1.1": 0.75, "layer1.1.conv1": 0.5}
    ratios = ratios_of(groups, wanted)
    assert ratios == [0.25, 0.5, None, None]
    found = ladders(groups, random_scores([64] * 4), round_to=8, max_ratio=0.9, ratios=ratios)
    for scope in ("layer", "global"):
        steps = allocate(found, 0.5, scope)
        assert steps[:2] == [16, 32]
        assert steps[2] + steps[3] == 64


def test_of_two_names_as_long_the_lower_ratio_counts() -> None:
    coupled = ChannelGroup(name="a.x", width=8, members=(), units=(), producers=("a.x", "b.x"))
    assert ratios_of([coupled], {"a": 0.75, "b": 0.25}) == [0.25]


def test_groups_without_scores_are_left_out() -> None:
    _, found = climb([16, 16], [None, np.ones(16)])
    assert [ladder.group for ladder in found] == [1]


def test_channels_without_any_importance_can_still_go() -> None:
    _, found = climb([16, 16], [np.zeros(16), np.ones(16)])
    assert sum(allocate(found, 0.5, "global")) == 16


def test_ratio_for_macs_is_the_smallest_that_suffices() -> None:
    def macs_at(ratio: float) -> int:
        return 1000 - 100 * int(ratio * 8)

    assert ratio_for_macs(macs_at, 1000) == 0.0
    found = ratio_for_macs(macs_at, 500)
    assert found == pytest.approx(5 / 8)
    assert macs_at(found) == 500
    assert ratio_for_macs(macs_at, 550) == found
    assert ratio_for_macs(macs_at, 199) is None
    assert macs_at(ratio_for_macs(macs_at, 200)) == 200


@given(st.integers(0, 50), st.floats(0.1, 0.95))
def test_what_a_goal_does_not_need_is_given_back(seed: int, share: float) -> None:
    widths = [16, 32, 64, 24]
    _, found = climb(widths, random_scores(widths, seed))
    # Channels cost unequally, as those of a stream that many layers share.
    costs = [40, 1, 2, 3]

    def cost(steps: list[int]) -> float:
        return sum(c * (w - step) for c, w, step in zip(costs, widths, steps, strict=True))

    limit = share * cost([0] * 4)
    steps = allocate(found, 0.6, "global")
    if cost(steps) > limit:
        return
    kept = give_back(found, steps, lambda trial: cost(trial) <= limit)
    assert cost(kept) <= limit
    assert all(new <= old for new, old in zip(kept, steps, strict=True))
    for index, ladder in enumerate(found):
        if kept[index]:
            lower = ladder.steps[ladder.steps.index(kept[index]) - 1]
            assert cost([*kept[:index], lower, *kept[index + 1 :]]) > limit, "one more could be given back"
