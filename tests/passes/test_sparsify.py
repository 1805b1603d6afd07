"""The pass `sparsify`, and `prune` in steps: both train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deploycnn import schema
from deploycnn.errors import RecipeError
from deploycnn.models.artifact import load_model
from deploycnn.passes import prune as prune_pass
from deploycnn.passes.prune import Prune
from deploycnn.passes.sparse import Sparse
from deploycnn.passes.sparsify import Sparsify
from deploycnn.pruning import regularization
from deploycnn.pruning.structure import analyse
from deploycnn.training.settings import TrainingSettings
from tests.passes.test_prune import context
from tests.passes.training_support import DATA, QUICK, as_artifact, make_artifact
from tests.pruning import nets

TUNE = TrainingSettings(**{**QUICK, "epochs": 1})


def norms(path: Path, group: str) -> torch.Tensor:
    model = load_model(path)
    groups = {found.name: found for found in analyse(model, nets.images(32)).groups}
    return regularization.squares(model, groups[group]).detach().sqrt()


@pytest.mark.parametrize(("method", "strength"), [("group_lasso", 0.3), ("growing", 2.0)])
def test_penalty_makes_channels_small(method: Any, strength: float, tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source")
    sizes = {}
    for name, force in (("weak", 1e-9), ("strong", strength)):
        where = context(tmp_path / name, data=DATA)
        made = as_artifact(Sparsify(**QUICK, method=method, strength=force).run(source, where), where.output)
        (first, *_) = [row[0] for row in made.facts.record["tables"][0]["rows"]]
        sizes[name] = norms(made.path, first).sort().values
        assert made.facts.record["sparsified"] == {"method": method, "strength": force, "groups": 4}
        assert len(made.facts.record["training"]["epochs"]) == 2
    half = len(sizes["weak"]) // 2
    assert float(sizes["strong"][:half].mean()) < 0.9 * float(sizes["weak"][:half].mean())
    if method == "growing":  # the others are left alone
        assert float(sizes["strong"][-1]) > 0.8 * float(sizes["weak"][-1])


def test_zeros_that_were_meant_stay(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source")
    where = context(tmp_path / "sparse", data=DATA)
    thin = as_artifact(Sparse(pattern="unstructured", sparsity=0.6).run(source, where), where.output)
    where = context(tmp_path / "sparsify", data=DATA, lineage=(thin,))
    made = as_artifact(Sparsify(**QUICK).run(thin, where), where.output)
    before, after = load_model(thin.path).state_dict(), load_model(made.path).state_dict()
    for name in (f"{layer}.weight" for layer in thin.facts.record["sparsity"]["layers"]):
        assert torch.equal(before[name] == 0, after[name] == 0)
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("early", [{"max_minutes": 1}, {"early_stopping_patience": 2}])
def test_growing_cannot_end_before_its_schedule(early: dict[str, Any]) -> None:
    with pytest.raises(
        RecipeError, match=r"growing follows a schedule.*leave max_minutes and early_stopping"
    ):
        schema.build(Sparsify, {"method": "growing", **early}, "sparsify")
    assert schema.build(Sparsify, early, "sparsify").method == "group_lasso"


def test_a_ratio_is_for_growing_only() -> None:
    with pytest.raises(RecipeError, match="pruning_ratio is for growing"):
        schema.build(Sparsify, {"pruning_ratio": 0.3}, "sparsify")


def test_sparsify_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_artifact(tmp_path / "source")
    step = Sparsify(**QUICK, method="growing", strength=1.0)
    whole = context(tmp_path / "whole", data=DATA)
    step.run(source, whole)
    where = context(tmp_path / "killed", data=DATA)
    from deploycnn.training import loop

    after = loop._Training.one_epoch

    def killed(self: Any, progress: Any) -> None:
        if progress.epochs:
            raise KeyboardInterrupt
        after(self, progress)

    monkeypatch.setattr(loop._Training, "one_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        step.run(source, where)
    monkeypatch.undo()
    step.run(source, where)
    file = "model.safetensors"
    assert (where.output / file).read_bytes() == (whole.output / file).read_bytes()


@pytest.mark.parametrize("goal", [{"pruning_ratio": 0.5}, {"macs_ratio": 0.4}])
def test_prune_in_steps_reaches_the_whole_goal(goal: dict[str, Any], tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source")
    where = context(tmp_path / "p", data=DATA)
    step = Prune(**goal, steps=3, tune=TUNE, round_to=1)
    assert step.needs_data
    made = as_artifact(step.run(source, where), where.output)
    record = made.facts.record["pruning"]
    entries = record["steps"]
    assert len(entries) == 3
    assert [set(entry) - {"macs_ratio", "pruning_ratio"} for entry in entries] == [
        {"training"},
        {"training"},
        set(),
    ]
    ratios = [entry["macs_ratio"] for entry in entries]
    assert ratios == sorted(ratios, reverse=True)
    assert record["macs_ratio"] == made.facts.macs / record["macs_before"] == ratios[-1]
    if "macs_ratio" in goal:
        assert 0.33 < ratios[-1] <= 0.4
        assert 0.6 < ratios[0] <= 0.74
    else:
        assert record["pruning_ratio"] == pytest.approx(0.5, abs=0.03)
        assert entries[0]["pruning_ratio"] == pytest.approx(1 - 0.5 ** (1 / 3), abs=0.03)
    model = load_model(made.path)
    for name, change in record["widths"].items():
        assert model.get_submodule(name).weight.shape[0] == change["after"][1]


@pytest.mark.usefixtures("unexported")
def test_prune_in_steps_continues_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_artifact(tmp_path / "source")
    step = Prune(pruning_ratio=0.5, steps=3, tune=TUNE, round_to=1)
    whole = context(tmp_path / "whole", data=DATA)
    expected = step.run(source, whole)
    where = context(tmp_path / "killed", data=DATA)
    real = prune_pass._tune

    def killed(*arguments: Any) -> Any:
        if arguments[1] == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(prune_pass, "_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        step.run(source, where)
    tuned: list[int] = []
    monkeypatch.setattr(prune_pass, "_tune", lambda *a: tuned.append(a[1]) or real(*a))
    got = step.run(source, where)
    assert tuned == [2]
    assert got.facts.record == expected.facts.record
    file = "model.safetensors"
    assert (where.output / file).read_bytes() == (whole.output / file).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "steps is 2 and tune is not set; set both or none"),
        ({"tune": {"epochs": 1}}, "steps is 1 and tune is set"),
        ({"steps": 2, "tune": {"epochs": 1}, "ratios": {"conv1": 0.5}}, "ratios: do not go with steps"),
    ],
)
def test_wrong_steps_are_recipe_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.build(Prune, {"pruning_ratio": 0.5} | options, "prune")
    assert message in str(caught.value)


def test_sensitivity_and_widths_are_tabled(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source")
    step = Prune(pruning_ratio=0.5, round_to=1, sensitivity=True)
    assert step.needs_data
    draft = step.run(source, context(tmp_path / "p", data=DATA))
    widths, sensitivity = draft.facts.record["tables"]
    assert widths["rows"][0][1] > widths["rows"][0][2]
    assert sensitivity["rows"][0][0] == "(nothing removed)"
    assert len(sensitivity["rows"]) == 5
    assert all(0 <= value <= 1 for row in sensitivity["rows"] for value in row[2:])
