"""The pass `prune`: from artifact to artifact."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from deploycnn import registry, schema
from deploycnn.core import MAIN_FILE, Artifact, Context, ProgressFn
from deploycnn.data.base import Data, Dataset
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.errors import PassRequirementError, PreprocessingError, RecipeError
from deploycnn.models.artifact import load_model
from deploycnn.models.macs import count_macs, count_params
from deploycnn.passes.prune import Prune
from tests.passes.conftest import FreshLogits
from tests.pruning.test_latency_goal import Exact


class Noise:
    """Images of noise, brighter with their class."""

    def __init__(self, count: int, may_decode: bool = True) -> None:
        self.labels = np.arange(count, dtype=np.int64) % 10
        self.names = tuple(map(str, range(count)))
        self.decoded: set[int] = set()
        self.may_decode = may_decode

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> npt.NDArray[np.uint8]:
        assert self.may_decode
        self.decoded.add(index)
        bright = 20 * int(self.labels[index])
        return np.random.default_rng(index).integers(bright, bright + 60, (32, 32, 3), dtype=np.uint8)


def noise(**preprocessing: Any) -> Data:
    hidden = Noise(20, may_decode=False)
    dataset = Dataset(
        name="noise",
        classes=tuple("abcdefghij"),
        train=Noise(200),
        val=hidden,
        test=hidden,
        fingerprint="noise",
    )
    return Data(
        dataset=dataset,
        preprocessing=Preprocessing(**{"size": (32, 32), "scale": "unit", **preprocessing}),
    )


def context(folder: Path, **more: Any) -> Context:
    for name in ("output", "scratch"):
        (folder / name).mkdir(parents=True)
    return Context(output=folder / "output", scratch=folder / "scratch", **more)


def made_by(
    kind: str, name: str, options: dict[str, Any], ctx: Context, source: Artifact | None = None
) -> Artifact:
    component = schema.build(registry.get(kind, name), options, name)
    draft = component.run(ctx) if source is None else component.run(source, ctx)
    fields = {field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)}
    return Artifact(key=name, path=ctx.output / MAIN_FILE[draft.format], parents=(), **fields)


def noting(seen: list[tuple[float, float]]) -> ProgressFn:
    """Notes what is told while images are looked at."""

    def progress(done: float, total: float, message: str = "") -> None:
        if "ONNX" not in message:
            seen.append((done, total))

    return progress


@pytest.fixture
def resnet(tmp_path: Path) -> Artifact:
    return made_by("source", "zoo", {"name": "resnet20"}, context(tmp_path / "source", data=noise()))


def test_pruned_artifact_holds_what_it_says(resnet: Artifact, tmp_path: Path) -> None:
    pruned = made_by(
        "pass", "prune", {"pruning_ratio": 0.5, "scope": "global"}, context(tmp_path / "p"), resnet
    )
    model = load_model(pruned.path)
    assert pruned.format == "torch"
    assert (pruned.inputs, pruned.outputs) == (resnet.inputs, resnet.outputs)
    facts = pruned.facts
    assert facts.params == count_params(model) < resnet.facts.params
    assert facts.macs == count_macs(model, (3, 32, 32)) < resnet.facts.macs
    assert facts.size_bytes == pruned.path.stat().st_size < resnet.facts.size_bytes
    assert (facts.classes, facts.preprocessing) == (resnet.facts.classes, resnet.facts.preprocessing)
    record = facts.record["pruning"]
    assert json.loads(json.dumps(record)) == record
    assert record["asked"] == {"pruning_ratio": 0.5}
    assert (record["importance"], record["norm"], record["scope"]) == ("magnitude", "l2", "global")
    assert (record["macs_before"], record["macs_after"]) == (resnet.facts.macs, facts.macs)
    for name, change in record["widths"].items():
        layer = model.get_submodule(name)
        assert change["after"][1] == layer.weight.shape[0]


@pytest.mark.usefixtures("unexported")
def test_same_seed_same_bytes(resnet: Artifact, tmp_path: Path) -> None:
    files = [
        made_by(
            "pass",
            "prune",
            {"pruning_ratio": 0.4, "importance": name},
            context(tmp_path / str(run), seed=seed, data=noise()),
            resnet,
        ).path.read_bytes()
        for run, (name, seed) in enumerate(
            [("random", 1), ("random", 1), ("random", 2), ("taylor", 1), ("taylor", 1), ("magnitude", 1)]
        )
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]
    assert files[3] == files[4]
    assert files[3] != files[5]


@pytest.mark.usefixtures("unexported")
def test_taylor_sees_training_images_only_evenly_over_classes(resnet: Artifact, tmp_path: Path) -> None:
    data = noise()
    seen: list[tuple[float, float]] = []
    ctx = context(tmp_path / "p", data=data, progress=noting(seen))
    options = {"pruning_ratio": 0.3, "importance": "taylor", "importance_images": 40}
    made_by("pass", "prune", options, ctx, resnet)
    train = data.dataset.train
    assert isinstance(train, Noise)
    assert np.bincount(train.labels[sorted(train.decoded)]).tolist() == [4] * 10
    assert seen == [(16, 40), (32, 40), (40, 40)]


@pytest.mark.usefixtures("unexported")
def test_taylor_progress_counts_the_images_there_are(resnet: Artifact, tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    ctx = context(tmp_path / "p", data=noise(), progress=noting(seen))
    made_by("pass", "prune", {"pruning_ratio": 0.3, "importance": "taylor"}, ctx, resnet)
    assert seen[-1] == (200, 200)


WITH_IMAGES: tuple[Any, ...] = ("taylor", "fisher", "group_fisher", "hrank", "chip")


@pytest.mark.usefixtures("unexported")
@pytest.mark.parametrize("name", ["group_norm", *WITH_IMAGES])
def test_every_importance_prunes(name: str, resnet: Artifact, tmp_path: Path) -> None:
    options = {"pruning_ratio": 0.3, "importance": name, "importance_images": 8}
    pruned = made_by("pass", "prune", options, context(tmp_path / "p", data=noise()), resnet)
    record = pruned.facts.record["pruning"]
    assert record["importance"] == name
    assert record["pruning_ratio"] > 0.2
    assert not any("nothing to rank" in kept["reason"] for kept in record["protected"])


def test_taylor_without_data_is_refused(resnet: Artifact, tmp_path: Path) -> None:
    step = Prune(pruning_ratio=0.3, importance="taylor")
    assert step.needs_data
    assert all(Prune(pruning_ratio=0.3, importance=name).needs_data for name in WITH_IMAGES)
    assert not Prune(pruning_ratio=0.3).needs_data
    assert not Prune.needs_data
    with pytest.raises(PassRequirementError, match=r"prune.importance: taylor needs images.*`data`"):
        step.run(resnet, context(tmp_path / "p"))
    assert list((tmp_path / "p/output").iterdir()) == []


def test_other_preprocessing_is_refused(resnet: Artifact, tmp_path: Path) -> None:
    with pytest.raises(PreprocessingError, match="prune: made for images prepared otherwise"):
        Prune(pruning_ratio=0.3).run(resnet, context(tmp_path / "p", data=noise(scale="signed")))


@pytest.mark.usefixtures("unexported")
def test_input_of_any_size_takes_that_of_the_data(resnet: Artifact, tmp_path: Path) -> None:
    spec = dataclasses.replace(resnet.inputs[0], shape=(None, 3, None, None))
    free = dataclasses.replace(resnet, inputs=(spec,))
    with pytest.raises(PassRequirementError, match="image size is not known"):
        Prune(pruning_ratio=0.3).run(free, context(tmp_path / "without"))
    draft = Prune(pruning_ratio=0.3).run(free, context(tmp_path / "with", data=noise()))
    assert draft.inputs == (spec,)
    assert draft.facts.macs is not None


def test_wrong_name_leaves_nothing_behind(resnet: Artifact, tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match='prune.protect: the model has no module "layer4"'):
        Prune(pruning_ratio=0.3, protect=("layer4",)).run(resnet, context(tmp_path / "p"))
    assert list((tmp_path / "p/output").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of pruning_ratio, macs_ratio, params_ratio and latency_ratio, got none"),
        ({"pruning_ratio": 0.5, "macs_ratio": 0.5}, "and latency_ratio, got pruning_ratio and macs_ratio"),
        ({"pruning_ratio": 0.95}, "pruning_ratio is 0.95, more than max_ratio = 0.9"),
        ({"macs_ratio": 0.5, "ratios": {"layer1": 0.95}}, "layer1 is 0.95, more than max_ratio"),
        ({"macs_ratio": 0.5, "latency_precision": "int8"}, "latency_precision is for latency_ratio"),
        ({"macs_ratio": 0.5, "importance": "taylor", "norm": "l1"}, "norm is for importance magnitude"),
        ({"pruning_ratio": 0.0}, "should be greater than 0"),
        ({"pruning_ratio": 1.0}, "should be less than 1"),
        ({"macs_ratio": 1.5}, "should be less than 1"),
        ({"pruning_ratio": 0.5, "ratios": {"layer1": 1.0}}, "should be less than 1"),
        ({"pruning_ratio": 0.5, "round_to": 0}, "should be greater than or equal to 1"),
        ({"pruning_ratio": 0.5, "importance": "taylr"}, "taylr"),
        ({"pruning_ratoi": 0.5}, 'did you mean "pruning_ratio"'),
    ],
)
def test_wrong_options_are_recipe_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.build(Prune, options, "variants.pruned.0.prune")
    assert message in str(caught.value)


def test_options_survive_the_recipe() -> None:
    options = {"macs_ratio": 0.5, "protect": ["conv1"], "ratios": {"layer3": 0.7}, "importance": "bn_scale"}
    step = schema.build(Prune, options, "prune")
    assert schema.build(Prune, schema.to_json(step), "prune") == step
    assert hash(step) == hash(schema.build(Prune, options, "prune"))
    assert {row[0] for row in schema.describe(Prune)} == set(schema.field_names(Prune))
    assert all(text for *_, text in schema.describe(Prune))


def test_module_loads_no_torch() -> None:
    heavy = "{'torch', 'torch_pruning', 'numpy'}"
    code = f"import sys, deploycnn.passes.prune; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("one_thread")
def test_fresh_process_computes_the_same_bits(
    resnet: Artifact, fresh_logits: FreshLogits, tmp_path: Path
) -> None:
    pruned = made_by("pass", "prune", {"macs_ratio": 0.5, "scope": "global"}, context(tmp_path / "p"), resnet)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = load_model(pruned.path)(images).numpy()
    np.testing.assert_array_equal(fresh_logits(pruned.path, images), expected)


def test_a_pruned_model_can_be_pruned_again(resnet: Artifact, tmp_path: Path) -> None:
    once = made_by("pass", "prune", {"pruning_ratio": 0.3}, context(tmp_path / "one"), resnet)
    twice = made_by("pass", "prune", {"pruning_ratio": 0.3}, context(tmp_path / "two"), once)
    assert twice.facts.macs < once.facts.macs < resnet.facts.macs
    assert twice.facts.record["pruning"]["macs_before"] == once.facts.macs


TORCHVISION = [
    "resnet18",
    pytest.param("resnet50", marks=pytest.mark.slow),
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "densenet121",
    "googlenet",
    "squeezenet1_1",
    pytest.param("alexnet", marks=pytest.mark.slow),
    pytest.param("vgg16", marks=pytest.mark.slow),
]
#: Groups other than the classifier that may be left alone, by model, with how their reasons begin.
ALLOWED = {
    "efficientnet_b0": ("no smaller multiple of round_to",),
    "shufflenet_v2_x1_0": ("a reshape moves these channels", "Torch-Pruning cannot follow these channels"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_published_architectures_lose_30_percent(name: str, tmp_path: Path) -> None:
    side = 96 if name == "alexnet" else 64
    source = made_by(
        "source", "torchvision", {"name": name, "input_size": [side, side]}, context(tmp_path / "source")
    )
    pruned = made_by("pass", "prune", {"pruning_ratio": 0.3}, context(tmp_path / "p"), source)
    record = pruned.facts.record["pruning"]
    assert record["pruning_ratio"] == pytest.approx(0.3, abs=0.02)
    assert record["macs_ratio"] < (0.75 if name == "shufflenet_v2_x1_0" else 0.56)
    others = [
        kept["reason"] for kept in record["protected"] if kept["reason"] != "these are the model's outputs"
    ]
    assert all(reason.startswith(ALLOWED[name]) for reason in others)
    for change in record["widths"].values():
        assert change["after"][1] in (change["before"][1], 8 * (change["after"][1] // 8))
    model = load_model(pruned.path)
    with torch.no_grad():
        logits = model(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()


@pytest.fixture
def few_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deploycnn.latency.samples.CONFIGS", 16)


@pytest.mark.usefixtures("one_thread", "few_configurations")
@pytest.mark.parametrize("options", [{}, {"latency_precision": "int8", "drop_blocks": True}])
def test_a_share_of_the_latency_is_reached_on_the_target(
    resnet: Artifact, tmp_path: Path, options: dict[str, Any]
) -> None:
    stopwatch = Exact()
    # Rules that leave widths as they are: to this stopwatch, channels of zeros would cost what others do.
    ctx = context(tmp_path / "p", data=noise(), stopwatch=stopwatch, target="openvino")
    draft = Prune(latency_ratio=0.6, round_to=2, importance_images=32, **options).run(resnet, ctx)
    latency = draft.facts.record["pruning"]["latency"]
    assert latency["met"] is True
    assert latency["measured_ratio"] == pytest.approx(0.6, rel=0.03)
    assert latency["precision"] == options.get("latency_precision", "fp32")
    assert stopwatch.races > 0
    assert draft.facts.macs == count_macs(load_model(ctx.output / MAIN_FILE["torch"]), (3, 32, 32))
    assert draft.facts.macs < 0.75 * (resnet.facts.macs or 0)
    titles = [table["title"] for table in draft.facts.record["tables"]]
    assert len(titles) == len(set(titles)) > 1
    json.dumps(draft.facts.record, allow_nan=False)


def test_wrong_names_are_told_before_anything_is_timed(resnet: Artifact, tmp_path: Path) -> None:
    class Refuses(Exact):
        def layer_ms(self, *_: Any, **__: Any) -> dict[str, float]:
            raise AssertionError("timed")

    ctx = context(tmp_path / "p", stopwatch=Refuses(), target="onnxruntime-cpu")
    with pytest.raises(PassRequirementError, match='prune.protect: the model has no module "layer4"'):
        Prune(latency_ratio=0.6, protect=("layer4",)).run(resnet, ctx)


def test_two_of_four_come_after_pruning(resnet: Artifact, tmp_path: Path) -> None:
    record = {"sparsity": {"pattern": "2:4", "layers": []}}
    sparse = dataclasses.replace(resnet, facts=dataclasses.replace(resnet.facts, record=record))
    with pytest.raises(PassRequirementError, match="put sparse behind it"):
        Prune(pruning_ratio=0.3).run(sparse, context(tmp_path / "p", lineage=(sparse,)))
