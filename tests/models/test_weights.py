import os
import pickle
import struct

import pytest
import safetensors.torch
import torch
from torch import nn

from deploycnn.errors import SourceError
from deploycnn.models import zoo
from deploycnn.models.weights import load_weights, read_state_dict
from tests.models.shared import SHARED, needs_shared


class Evil:
    """Touches a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return zoo.build("lenet5")


@pytest.fixture
def state(model):
    torch.manual_seed(1)
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".safetensors"])
def test_formats(tmp_path, model, state, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    assert load_weights(model, path).tensors == len(state)
    assert same(model, state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "best_prec1": 91.7, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"state_dict": {f"module.{key}": value for key, value in s.items()}},
        lambda s: {f"module._orig_mod.{key}": value for key, value in s.items()},
        lambda s: {f"_orig_mod.{key}": value for key, value in s.items()},
    ],
)
def test_wrappers_and_prefixes(tmp_path, model, state, wrap):
    path = tmp_path / "weights.pth"
    torch.save(wrap(state), path)
    load_weights(model, path)
    assert same(model, state)


def test_half_precision_is_widened(tmp_path, model, state):
    path = tmp_path / "weights.pt"
    torch.save({key: value.half() for key, value in state.items()}, path)
    load_weights(model, path)
    assert same(model, {key: value.half().float() for key, value in state.items()})


@pytest.mark.parametrize("form", ["checkpoint", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_not_executed(tmp_path, model, form):
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "payload": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["payload"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "checkpoint")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SourceError, match="refused, not executed") as caught:
        load_weights(model, path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert same(model, before)
    # The trap works: a careless reader would have sprung it.
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_truncated_checkpoints(tmp_path, model, state, new_format, fraction):
    path = tmp_path / "weights.pt"
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(SourceError, match="truncated|refused") as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"", "truncated or not safetensors"),
        ("w.safetensors", struct.pack("<Q", 1 << 40) + b"{}", "truncated or not safetensors"),
        ("w.pt", b"a text file, not weights", "truncated or not a PyTorch checkpoint|refused"),
        ("w.npz", b"PK", 'unknown kind of weights file ".npz"'),
    ],
)
def test_other_files(tmp_path, model, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        load_weights(model, tmp_path / name)


def test_missing_file(tmp_path, model):
    with pytest.raises(SourceError, match="no such file"):
        load_weights(model, tmp_path / "nothing.pt")


def test_no_state_dict_inside(tmp_path, model):
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(SourceError, match="holds no state dict but list"):
        load_weights(model, tmp_path / "w.pt")
    torch.save({"weight": torch.zeros(1), "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(SourceError, match="values that are no tensors: epoch"):
        load_weights(model, tmp_path / "w.pt")


def test_every_missing_unexpected_and_misshaped_tensor_is_listed_and_nothing_loaded(tmp_path, model, state):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del state["features.0.bias"], state["classifier.2.weight"]
    state["extra.one"], state["extra.two"] = torch.zeros(1), torch.zeros(1)
    state["features.3.weight"] = torch.zeros(16, 6, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SourceError) as caught:
        load_weights(model, tmp_path / "w.pt")
    text = str(caught.value)
    for part in (
        "missing tensors (2): features.0.bias, classifier.2.weight",
        "unexpected tensors (2): extra.one, extra.two",
        "features.3.weight is [16, 6, 3, 3], not [16, 6, 5, 5]",
        "LeNet5",
    ):
        assert part in text
    assert same(model, before)


def test_long_lists_are_cut_with_a_count(tmp_path):
    torch.save({f"k{i}": torch.zeros(1) for i in range(30)}, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"unexpected tensors \(30\): .* and 10 more"):
        load_weights(zoo.build("lenet5"), tmp_path / "w.pt")


def test_nan_and_integer_weights_are_refused(tmp_path, model, state):
    state["features.0.bias"][2] = torch.nan
    state["features.3.bias"] = torch.zeros(16, dtype=torch.int8)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"reverse \(1\): features\.3\.bias; .*NaN.*features\.0\.bias"):
        load_weights(model, tmp_path / "w.pt")


def test_classifier_of_another_class_count(tmp_path, model):
    torch.manual_seed(2)
    other = zoo.build("lenet5", num_classes=100)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    with pytest.raises(SourceError, match="tells 100 classes apart, the model needs 10; set new_head: true"):
        load_weights(model, tmp_path / "w.pt")
    head = {key: model.state_dict()[key].clone() for key in ("classifier.4.weight", "classifier.4.bias")}
    loaded = load_weights(model, tmp_path / "w.pt", new_head=True)
    assert set(loaded.new_head) == set(head)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in head.items())
    assert torch.equal(model.state_dict()["features.0.weight"], other.state_dict()["features.0.weight"])


def test_another_architecture_is_no_new_head(tmp_path):
    torch.save(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5)).state_dict(), tmp_path / "w.pt"
    )
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(SourceError, match="tensors of another shape"):
        load_weights(model, tmp_path / "w.pt", new_head=True)


def test_checkpoints_without_batch_counters_load(tmp_path):
    model = zoo.build("resnet20")
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "w.th")
    assert load_weights(model, tmp_path / "w.th").tensors == len(state)


@needs_shared
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet20", "resnet20-12fca82f.th"),
        ("resnet56", "resnet56-4bfd9763.th"),
        ("resnet20", "resnet20-cifar10-jpeg.safetensors"),
        ("resnet56", "resnet56-cifar10-jpeg.safetensors"),
    ],
)
def test_published_checkpoints_load(name, file):
    path = SHARED / "data" / "weights" / file
    model = zoo.build(name)
    load_weights(model, path)
    state = read_state_dict(path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
