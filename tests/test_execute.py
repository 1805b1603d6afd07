"""The walk: hits, misses, failures that stay where they belong, and resumption."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from deploycnn import recipe as recipes
from deploycnn.conclusion import provenance
from deploycnn.errors import StorageError
from deploycnn.events import Silent
from deploycnn.execute import Outcome, execute
from deploycnn.plan import plan
from deploycnn.store import Store
from tests.fakes import Export, Tune

pytestmark = pytest.mark.usefixtures("fake_components")


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploycnn.execute._device", lambda _: "cpu")


def run(root: Path, variants: dict[str, Any], **changes: Any) -> Outcome:
    recipe = recipes.parse({"source": {"model": "m"}, "variants": variants, **changes}, base=Path())
    planned = plan(recipe, data_fingerprint=None)
    with Store.open(root) as store:
        outcome = execute(recipe, planned, store, None, Silent())
        store.link_variants(planned)
    return outcome


VARIANTS: dict[str, Any] = {"fp32": ["export"], "small": [{"tune": {"teacher": "fp32"}}, "export"]}


def test_a_second_run_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path / "r", VARIANTS)
    assert (len(first.artifacts), first.hits, first.failures) == (4, set(), {})
    text = (tmp_path / "r/variants/small/model.onnx").read_text()
    assert text == "m seed 0\ntuned 1 " + text.split()[5] + "\nexported"
    monkeypatch.setattr(Export, "run", None)
    second = run(tmp_path / "r", VARIANTS)
    assert second.hits == set(first.artifacts)


def test_only_what_follows_from_a_change_is_made_again(tmp_path: Path) -> None:
    run(tmp_path / "r", VARIANTS)
    outcome = run(
        tmp_path / "r", {**VARIANTS, "small": [{"tune": {"teacher": "fp32", "amount": 5}}, "export"]}
    )
    assert len(outcome.hits) == 2


def test_a_failure_stays_in_its_variants(tmp_path: Path) -> None:
    outcome = run(
        tmp_path / "r",
        {"a": ["export"], "b": ["export", "fail"], "c": ["export", "fail", {"fail": {"ours": True}}]},
    )
    assert list(outcome.failures.values()) == ["fail: does not fit"] * 2
    assert outcome.bugs == []
    assert not list((tmp_path / "r/artifacts").glob("fail-*"))
    assert (tmp_path / "r/variants/a").exists()
    assert not (tmp_path / "r/variants/b").exists()
    assert "PassRequirementError" in next((tmp_path / "r/failures").glob("fail-*.txt")).read_text()


def test_our_own_bug_keeps_its_traceback(tmp_path: Path) -> None:
    outcome = run(tmp_path / "r", {"a": ["export", {"fail": {"ours": True}}]})
    assert [type(bug) for bug in outcome.bugs] == [ZeroDivisionError]
    assert "in run" in next((tmp_path / "r/failures").glob("fail-*.txt")).read_text()


def test_a_failure_is_tried_again_and_forgotten_once_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Tune, "run", broken)
        assert run(tmp_path / "r", {"a": ["tune", "export"]}).failures
    assert not run(tmp_path / "r", {"a": ["tune", "export"]}).failures
    assert not list((tmp_path / "r/failures").iterdir())


def test_a_damaged_artifact_is_made_again(tmp_path: Path) -> None:
    run(tmp_path / "r", {"a": ["export"]})
    damaged = tmp_path / "r/variants/a/model.onnx"
    good = damaged.read_text()
    damaged.write_text("garbage")
    outcome = run(tmp_path / "r", {"a": ["export"]})
    assert len(outcome.hits) == 1
    assert damaged.read_text() == good


def test_a_full_disk_ends_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(Export, "run", full)
    with pytest.raises(StorageError):
        run(tmp_path / "r", VARIANTS)
    assert not list((tmp_path / "r/artifacts").glob("export-*"))


def test_a_pass_is_told_what_its_input_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {}
    for component in (Tune, Export):
        original = component.run

        def run_and_note(self: Any, source: Any, ctx: Any, original: Any = original) -> Any:
            seen[type(self).__name__] = [artifact.path.read_text() for artifact in ctx.lineage]
            assert ctx.lineage[-1] == source
            return original(self, source, ctx)

        monkeypatch.setattr(component, "run", run_and_note)
    outcome = run(tmp_path / "r", {"a": ["tune", "export"]})
    assert not outcome.failures
    assert not outcome.bugs
    assert seen["Tune"] == ["m seed 0"]
    assert seen["Export"][0] == "m seed 0"
    assert len(seen["Export"]) == 2


def test_passes_get_a_stopwatch_only_where_the_target_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploycnn.execute import stopwatch
    from deploycnn.runtimes.base import Availability

    class Runtime:
        mode = "m"

        def __init__(self, ok: bool, device: str = "cpu") -> None:
            self.ok, self.device = ok, device

        def device_of(self, mode: str) -> str:
            return self.device

        def availability(self) -> Availability:
            return Availability(ok=self.ok)

    profile = {"batch_sizes": [1, 8], "threads": [1, 2]}
    recipe = recipes.parse(
        {"source": {"model": "m"}, "profile": profile, "variants": {"fp32": ["export"]}}, base=Path()
    )
    found = []
    for runtime in (Runtime(True), Runtime(False), Runtime(True, "cuda")):
        monkeypatch.setattr("deploycnn.execute.create", lambda _, it=runtime: it)
        found.append(stopwatch(recipe, None, logging.getLogger("test")))
    assert found[1] is None
    assert found[0].settings == ((1, 1), (8, 1), (1, 2), (8, 2))
    assert found[2].settings == ((1, 1), (8, 1)), "threads make no difference on a GPU"


def test_warnings_of_a_step_reach_who_watches_the_run_and_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Watching(Silent):
        def warning(self, text: str) -> None:
            told.append(text)

    original = Export.run

    def doubtful(self: Export, source: Any, ctx: Any) -> Any:
        ctx.log.info("as usual")
        ctx.log.warning("off by %d%%", 7)
        return original(self, source, ctx)

    monkeypatch.setattr(Export, "run", doubtful)
    recipe = recipes.parse({"source": {"model": "m"}, "variants": {"fp32": ["export"]}}, base=Path())
    planned = plan(recipe, data_fingerprint=None)
    with Store.open(tmp_path / "r") as store:
        for _ in range(2):
            execute(recipe, planned, store, None, Watching())
        # Made once, and told once; the report of the second run still knows.
        kept = [provenance(store.manifest(planned.step(key)))["warnings"] for key in planned.chains["fp32"]]
    assert told == ["export: off by 7%"]
    assert kept == [[], ["off by 7%"]]
    assert "WARNING off by 7%" in next((tmp_path / "r/artifacts").glob("export-*/log.txt")).read_text()
