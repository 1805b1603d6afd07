import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from deploycnn.errors import ArtifactError
from deploycnn.models import zoo
from deploycnn.models.artifact import (
    architecture,
    get_architecture,
    load_model,
    save_model,
)
from deploycnn.models.cifar_resnet import PadShortcut
from deploycnn.models.macs import count_params
from tests.models.pruned import build, logits, prune

RELOAD = """
import pickle, sys
from pathlib import Path
import torch
from deploycnn.models.artifact import load_model
from safetensors.torch import save_file

def refuse(*_, **__):
    raise RuntimeError("a pickle was read")

pickle.load = pickle.loads = torch.load = refuse
torch.set_num_threads(1)
for folder, size in zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True):
    model = load_model(folder)
    assert not model.training
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        save_file({"logits": model(image)}, Path(folder) / "logits.out")
"""

PRUNED = {
    "resnet18": ("fc", 64),
    "mobilenet_v2": ("classifier.1", 64),
    "densenet121": ("classifier", 64),
    "googlenet": ("fc", 64),
}


def reload_elsewhere(*jobs):
    """Write the logits of stored models, from a fresh process that refuses to unpickle anything."""
    arguments = [str(item) for job in jobs for item in job]
    subprocess.run([sys.executable, "-c", RELOAD, *arguments], check=True, timeout=300)


def reloaded_logits(folder):
    return safetensors.torch.load_file(folder / "logits.out")["logits"]


@pytest.fixture(scope="module")
def pruned_models(tmp_path_factory):
    """Name -> folder and logits before storage; all reloaded by one fresh process."""
    torch.set_num_threads(1)
    expected, folders = {}, {}
    for name, (classifier, size) in PRUNED.items():
        model = prune(build("torchvision", {"name": name}, 10), 0.3, size, classifier)
        folders[name] = tmp_path_factory.mktemp(name)
        save_model(model, folders[name])
        expected[name] = (count_params(model), logits(model, size))
    reload_elsewhere(*((folders[name], PRUNED[name][1]) for name in PRUNED))
    return {name: (folders[name], *expected[name]) for name in PRUNED}


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_torchvision_models_reload_bit_exactly_in_a_fresh_process(pruned_models, name):
    folder, params, expected = pruned_models[name]
    assert params < 0.8 * count_params(build("torchvision", {"name": name}, 10))
    assert torch.equal(reloaded_logits(folder), expected)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["lenet5", "resnet20b", "mobilenet_v2"]),
    ratio=st.floats(0.05, 0.7),
    seed=st.integers(0, 1000),
)
def test_any_pruned_model_survives_storage(tmp_path, name, ratio, seed):
    classifiers = {"lenet5": "classifier.4", "resnet20b": "linear", "mobilenet_v2": "classifier.1"}
    model = prune(build("zoo", {"name": name}, 10, seed), ratio, 32, classifiers[name])
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert torch.equal(logits(loaded, 32), logits(model, 32))
    # What was loaded can be stored again, as passes do.
    (tmp_path / "again").mkdir(exist_ok=True)
    save_model(loaded, tmp_path / "again")
    for file in ("model.safetensors", "architecture.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_pruned_shortcut_geometry_is_stored(tmp_path):
    model = build("zoo", {"name": "resnet20"}, 10)
    keep = torch.arange(2, 16)
    # Channels 0 and 1 of the first stage are removed; in the second stage, zeros take their places 8 and 9.
    for name, module in model.named_modules():
        if name in ("conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"):
            module.weight, module.out_channels = nn.Parameter(module.weight[keep]), 14
        if name in ("bn1", "layer1.0.bn2", "layer1.1.bn2", "layer1.2.bn2"):
            for part in ("weight", "bias"):
                setattr(module, part, nn.Parameter(getattr(module, part)[keep]))
            module.running_mean, module.running_var = module.running_mean[keep], module.running_var[keep]
            module.num_features = 14
        if name in ("layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1", "layer2.0.conv1"):
            module.weight, module.in_channels = nn.Parameter(module.weight[:, keep]), 14
    shortcut = model.get_submodule("layer2.0.shortcut")
    assert isinstance(shortcut, PadShortcut)
    shortcut.in_channels, shortcut.channels_before = 14, 10
    save_model(model, tmp_path)
    delta = json.loads((tmp_path / "architecture.json").read_text())["delta"]
    assert delta["attributes"]["layer2.0.shortcut"] == {"in_channels": 14, "channels_before": 10}
    assert torch.equal(logits(load_model(tmp_path), 32), logits(model, 32))


def tied(num_classes: int = 4) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, num_classes))
    model[2].weight = model[1].weight
    model.register_buffer("scale", torch.rand(3), persistent=False)
    return model


@pytest.fixture
def tied_source(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "tied_model.py").write_text("from tests.models.test_artifact import tied\n")
    monkeypatch.syspath_prepend(str(folder))
    return architecture("entrypoint", {"function": "tied_model:tied"}, 4)


def test_tied_parameters_and_transient_buffers_come_back(tmp_path, tied_source):
    model = tied()
    save_model(model, tmp_path, tied_source)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "2.weight" not in stored
    loaded = load_model(tmp_path)
    assert loaded[2].weight is loaded[1].weight
    assert torch.equal(loaded.scale, model.scale)
    assert torch.equal(loaded(torch.ones(1, 3, 2, 2)), model.eval()(torch.ones(1, 3, 2, 2)))


def test_untied_parameters_stay_untied(tmp_path, tied_source):
    model = tied()
    model[2].weight = nn.Parameter(torch.rand(12, 12))
    save_model(model, tmp_path, tied_source)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded[2].weight, model[2].weight)
    assert torch.equal(loaded[1].weight, model[1].weight)


def test_views_of_one_storage_are_taken_apart(tmp_path, tied_source):
    model = tied()
    both = torch.rand(24, 12)
    model[1].weight, model[2].weight = nn.Parameter(both[:12]), nn.Parameter(both[12:])
    save_model(model, tmp_path, tied_source)
    assert torch.equal(load_model(tmp_path)[2].weight, both[12:])


@pytest.fixture
def stored(tmp_path):
    model = build("zoo", {"name": "lenet5"}, 10)
    save_model(model, tmp_path)
    return tmp_path


def edit(folder, change):
    path = folder / "architecture.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def test_file_or_folder(stored):
    for path in (stored, stored / "model.safetensors", str(stored)):
        assert get_architecture(load_model(path)) == architecture("zoo", {"name": "lenet5"}, 10)


@pytest.mark.parametrize("length", [0, 5, 100, 1000, -1])
def test_truncated_weights(stored, length):
    path = stored / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ArtifactError, match="truncated or not safetensors"):
        load_model(stored)


@pytest.mark.parametrize("file", ["model.safetensors", "architecture.json"])
def test_missing_file(stored, file):
    (stored / file).unlink()
    with pytest.raises(ArtifactError, match=f"{file}: missing"):
        load_model(stored)


def test_missing_and_unexpected_tensors_are_each_listed(stored):
    def change(tensors):
        del tensors["classifier.0.weight"], tensors["features.3.bias"]
        tensors["extra"] = torch.zeros(1)

    rewrite(stored, change)
    with pytest.raises(
        ArtifactError, match=r"classifier\.0\.weight, features\.3\.bias.*unexpected tensors: extra"
    ):
        load_model(stored)


def test_tensor_of_another_shape(stored):
    rewrite(stored, lambda tensors: tensors.update({"features.0.weight": torch.zeros(6, 3, 3, 3)}))
    with pytest.raises(ArtifactError, match=r"features\.0\.weight is \[6, 3, 3, 3\], not \[6, 3, 5, 5\]"):
        load_model(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=99), "schema version 99"),
        (lambda c: c.pop("options"), "lacks options"),
        (lambda c: c.update(options={}), "cannot build a model of its options"),
        (lambda c: c.update(num_classes="10"), "num_classes"),
        (lambda c: c.update(num_classes={}), "num_classes"),
        (lambda c: c.update(num_classes=0), "num_classes"),
        (lambda c: c.update(delta={"attributes": {"nowhere": {"p": 1}}}), 'module "nowhere"'),
        (lambda c: c.update(delta={"attributes": {"features.0": {"forward": 1}}}), "features.0.forward"),
        (
            lambda c: c.update(delta={"attributes": {"features.0": {"_parameters": 1}}}),
            "features.0._parameters",
        ),
        (lambda c: c.update(delta={"shapes": {"nothing": [1]}}), "does not have: nothing"),
        (lambda c: c.update(delta={"code": "import os"}), "delta should hold"),
        (lambda c: c.update(delta={"shapes": {"features.0.bias": "x"}}), "damaged"),
        (lambda c: c.update(source=3), "wrong type"),
    ],
)
def test_an_architecture_file_that_does_not_fit(stored, change, message):
    edit(stored, change)
    with pytest.raises(ArtifactError, match=message.replace(".", r"\.")):
        load_model(stored)


def test_sharing_what_is_not_stored(stored):
    edit(stored, lambda content: content.update(delta={"shared": {"features.0.bias": "features.9.bias"}}))
    rewrite(stored, lambda tensors: tensors.pop("features.0.bias"))
    with pytest.raises(ArtifactError, match='shares "features.9.bias", which is not stored'):
        load_model(stored)


def test_damaged_architecture_file(stored):
    (stored / "architecture.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        load_model(stored)


def test_replaced_modules_cannot_be_stored_quietly(tmp_path):
    model = build("zoo", {"name": "lenet5"}, 10)
    model.features[1] = nn.Identity()
    with pytest.raises(ArtifactError, match=r"features\.1"):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_without_architecture_cannot_be_stored(tmp_path):
    with pytest.raises(ArtifactError, match="carries no architecture"):
        save_model(zoo.build("lenet5"), tmp_path)


def test_loading_leaves_the_random_generator_alone(stored):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(stored)
    assert torch.equal(torch.rand(3), expected)
