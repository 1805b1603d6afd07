from __future__ import annotations

from dataclasses import replace
from typing import Any

from deploycnn.errors import PassRequirementError
from deploycnn.quantization.judge import Judgement
from deploycnn.quantization.ladder import Rung, climb

#: In the fakes a candidate is a tuple of remedies, and each has its drop and SQNR.


def climbing(
    worth: dict[tuple[str, ...], tuple[float, float]], rungs: list[Rung[Any]], budget: float | None = 0.0
):
    seconds = iter(range(1000))

    def judge(graph: Any) -> Judgement:
        drop, sqnr = worth[graph]
        return Judgement(top1_drop=drop, agreement=1 - drop, sqnr_db=sqnr, images=10_000)

    return climb(
        (), rungs, lambda candidate: candidate, judge, max_top1_drop=budget, first="plain",
        clock=lambda: float(next(seconds)),
    )  # fmt: skip


def adding(name: str) -> Rung[Any]:
    return Rung(name=name, apply=lambda best: (*best, name))


def test_it_stops_at_the_budget() -> None:
    worth = {(): (0.05, 20.0), ("a",): (0.001, 30.0)}
    found = climbing(worth, [adding("a"), adding("b")], budget=0.002)
    assert found.met
    assert found.candidate == ("a",)
    assert [step.rung for step in found.tried] == ["plain", "a"]
    assert all(step.seconds > 0 for step in found.tried)


def test_what_harms_is_undone_and_said() -> None:
    worth = {(): (0.05, 20.0), ("a",): (0.09, 25.0), ("b",): (0.03, 26.0), ("b", "c"): (0.0301, 24.0)}
    found = climbing(worth, [adding("a"), adding("b"), adding("c")])
    assert not found.met
    assert found.candidate == ("b",)
    assert [step.kept for step in found.tried] == [True, False, True, False]
    assert found.tried[1].why
    assert found.judgement.top1_drop == 0.03


def test_sqnr_ranks_what_top1_cannot() -> None:
    worth = {(): (0.0100, 20.0), ("a",): (0.0101, 28.0)}
    assert climbing(worth, [adding("a")]).candidate == ("a",)
    worth = {(): (0.0100, 20.0), ("a",): (0.0099, 18.0)}
    assert climbing(worth, [adding("a")]).candidate == ()


def test_a_rung_that_does_not_suit_is_logged_with_its_reason() -> None:
    def refuse(best: Any) -> Any:
        raise PassRequirementError("no such activation")

    worth = {(): (0.05, 20.0), ("b",): (0.0, 30.0)}
    found = climbing(worth, [Rung(name="a", apply=refuse), adding("b")])
    assert found.met
    row = found.tried[1].to_json()
    assert (row["kept"], row["why"]) == (False, "no such activation")
    assert "sqnr_db" not in row
    assert found.tried[2].to_json()["sqnr_db"] == 30.0


def test_without_a_budget_every_rung_is_tried_that_may_be_needed() -> None:
    worth = {(): (0.0, 15.0), ("a",): (0.0, 25.0), ("a", "c"): (0.0, 24.0)}
    rungs = [adding("a"), replace(adding("b"), below_db=20.0), replace(adding("c"), below_db=25.1)]
    found = climbing(worth, rungs, budget=None)
    assert found.candidate == ("a",)
    assert [(step.rung, step.kept) for step in found.tried] == [("plain", True), ("a", True), ("c", False)]
    assert not found.met


def test_without_a_budget_noise_alone_ranks() -> None:
    worth = {(): (-0.2, 15.0), ("a",): (0.0, 40.0), ("a", "b"): (-0.3, 39.0)}
    assert climbing(worth, [adding("a"), adding("b")], budget=None).candidate == ("a",)


def test_being_right_more_often_than_the_float_model_is_no_merit() -> None:
    worth = {(): (-0.2, 15.0), ("a",): (0.0, 40.0), ("a", "b"): (-0.3, 39.0)}
    found = climbing(worth, [adding("a"), adding("b")], budget=-1.0)
    assert found.candidate == ("a",)


def test_what_meets_the_budget_is_kept_however_noisy_its_outputs() -> None:
    """Training moves the outputs away from the float model's, and may win all of top-1 back."""
    worth = {(): (0.003, 30.0), ("qat",): (0.001, 20.0)}
    found = climbing(worth, [adding("qat")], budget=0.002)
    assert found.met
    assert found.candidate == ("qat",)
