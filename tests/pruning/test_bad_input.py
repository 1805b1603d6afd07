"""Models and wishes that pruning must refuse, each with one line that says what and where."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deploycnn.cli import main
from deploycnn.errors import PassRequirementError
from deploycnn.models.artifact import architecture, save_model
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.pruning.layers import widths
from deploycnn.pruning.pruner import Goal, prune
from deploycnn.pruning.structure import analyse
from tests.pruning import nets
from tests.pruning.test_pruner import MAGNITUDE

CODE = '''
import torch
from torch import nn


class Chooser(nn.Module):
    """Takes another way for bright images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.bright = nn.Conv2d(16, 16, 3)
        self.dark = nn.Conv2d(16, 16, 3)
        self.fc = nn.Linear(16, 10)

    def forward(self, images):
        x = self.stem(images)
        if images.mean() > 0:
            x = self.bright(x)
        else:
            x = self.dark(x)
        return self.fc(x.mean((2, 3)))


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
'''


class Tied(nn.Module):
    """Two layers with the same weights, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.two.weight = self.one.weight
        self.free = nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.stem(images))))
        return self.fc(torch.relu(self.free(torch.relu(self.two(x)))).mean((2, 3)))


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "chooser_net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("chooser_net", None)


def test_tied_weights_stay_and_are_named() -> None:
    model = Tied()
    structure = analyse(model, nets.images())
    reasons = {layer: kept.reason for kept in structure.protected for layer in kept.layers}
    assert {group.name for group in structure.groups} == {"free"}
    assert reasons["one"] == "one has its weights in common with two, which would come apart"
    record = prune(model, nets.images(), MAGNITUDE, Goal(pruning_ratio=0.5))
    assert model.one.weight is model.two.weight
    assert set(record["widths"]) == {"free", "fc"}
    with pytest.raises(
        PassRequirementError, match='nothing in "one" can be pruned: one has its weights in common with two'
    ):
        prune(Tied(), nets.images(), MAGNITUDE, Goal(pruning_ratio=0.5, ratios={"one": 0.5}))


def test_control_flow_that_depends_on_data_is_refused_with_its_line(user_module: Path) -> None:
    sys.path.insert(0, str(user_module))
    import chooser_net

    model = chooser_net.Chooser()
    before = widths(model)
    message = r'depends on the values in the images \(chooser_net.py:18: "if images.mean\(\) > 0:"\)'
    with pytest.raises(PassRequirementError, match=message):
        prune(model, nets.images(), MAGNITUDE, Goal(pruning_ratio=0.5))
    assert widths(model) == before
    with pytest.raises(PassRequirementError, match=r"^sparse.permute: which way the model takes"):
        analyse(model, nets.images(), where="sparse.permute")


class Recurrent(nn.Module):
    def __init__(self, cell: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.memory = nn.LSTMCell(8, 8) if cell else nn.GRU(8, 8, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).relu().mean(3).transpose(1, 2)
        if isinstance(self.memory, nn.LSTMCell):
            return self.fc(self.memory(rows[:, 0])[0])
        return self.fc(self.memory(rows)[0][:, -1])


@pytest.mark.parametrize(("cell", "kind"), [(False, "GRU"), (True, "LSTMCell")])
def test_recurrent_modules_are_refused_by_name(cell: bool, kind: str) -> None:
    """Torch-Pruning did not end on them."""
    with pytest.raises(PassRequirementError, match=f'^prune: "memory" is an nn.{kind}'):
        prune(Recurrent(cell), nets.images(), MAGNITUDE, Goal(pruning_ratio=0.5))


@pytest.mark.parametrize(
    "look",
    [
        lambda x: max(x.mean((1, 2, 3)).tolist()) > 0,
        lambda x: float(x.mean((1, 2, 3)).detach().numpy()[0]) > 0,
        lambda x: torch.equal(x, x.abs()),
    ],
)
def test_values_read_past_all_operators_are_seen(look: Callable[[Tensor], bool]) -> None:
    class Looks(CifarResNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if look(images) else -images)

    with pytest.raises(
        PassRequirementError, match=r"depends on the values in the images \(test_bad_input.py:"
    ):
        analyse(Looks(8), nets.images(32))


def test_lists_of_weights_are_no_choices_by_data() -> None:
    class ByWeights(CifarResNet):
        def forward(self, images: Tensor) -> Tensor:
            gain = self.conv1.weight.detach().flatten().tolist()[0] + self.conv1.weight.detach().numpy().size
            return super().forward(images * gain)

    assert analyse(ByWeights(8), nets.images(32)).groups


def test_choices_by_shape_are_no_choices_by_data() -> None:
    class ByShape(CifarResNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if images.shape[-1] > 8 else images.repeat(1, 1, 2, 2))

    assert analyse(ByShape(8), nets.images(32)).groups


def test_choices_by_constants_and_weights_are_no_choices_by_data() -> None:
    class ByConstant(CifarResNet):
        def __init__(self, depth: int) -> None:
            super().__init__(depth)
            self.register_buffer("gain", torch.tensor(2.0))

        def forward(self, images: Tensor) -> Tensor:
            spread = self.state_dict()["gain"] + images.new_zeros(())
            return super().forward(images * spread.item() if self.gain > 1 else images)

    assert analyse(ByConstant(8), nets.images(32)).groups


def test_a_choice_by_what_was_written_in_place_is_one_by_data() -> None:
    class Writes(CifarResNet):
        def forward(self, images: Tensor) -> Tensor:
            total = torch.zeros((), dtype=images.dtype)
            total += images.sum()
            return super().forward(images if total > 0 else -images)

    with pytest.raises(PassRequirementError, match="depends on the values in the images"):
        analyse(Writes(8), nets.images(32))


RECIPE = {"name": "bad", "preprocessing": {"size": 16}, "data": "digits", "profile": {"budget_s": 0.1}}


@pytest.mark.parametrize(
    ("function", "prune_options", "message"),
    [
        ("Chooser", {"pruning_ratio": 0.5}, "depends on the values in the images"),
        (
            "Plain",
            {"pruning_ratio": 0.5, "protect": ["0", "2"]},
            "no layer can be pruned: these are the model's outputs; protected by the recipe (0)",
        ),
    ],
)
def test_the_command_line_refuses_in_one_line(
    function: str, prune_options: object, message: str, user_module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPE | {
        "source": {"entrypoint": f"chooser_net:{function}"},
        "variants": {"small": [{"prune": prune_options}, "export"]},
    }
    recipe["preprocessing"] = {"size": 16, "channels": "rgb"}
    (user_module / "r.yaml").write_text(json.dumps(recipe))
    assert main(["compress", "r.yaml", "--out", "out"]) == 2
    told = capsys.readouterr()
    assert message in " ".join((told.err + told.out).split())
    assert "Traceback" not in told.err + told.out
    assert not list(user_module.glob("out/**/prune*/**/model.safetensors"))


def test_a_checkpoint_that_does_not_fit_the_delta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {}
    for name, ratio in (("half", 0.5), ("dense", None)):
        model = CifarResNet(20).eval()
        if ratio is not None:
            prune(model, nets.images(32), MAGNITUDE, Goal(pruning_ratio=ratio))
        folders[name] = tmp_path / name
        folders[name].mkdir()
        save_model(model, folders[name], architecture("zoo", {"name": "resnet20", "in_channels": 3}, 10))
    whole = load_file(folders["half"] / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in whole.items()}, folders["half"] / "model.safetensors")
    assert main(["inspect", str(folders["half"])]) == 2
    told = capsys.readouterr()
    assert "conv1.weight is torch.float16, not torch.float32" in " ".join((told.err + told.out).split())
    stored = (folders["dense"] / "model.safetensors").read_bytes()
    (folders["half"] / "model.safetensors").write_bytes(stored)
    assert main(["inspect", str(folders["half"])]) == 2
    told = capsys.readouterr()
    text = " ".join((told.err + told.out).split())
    assert "tensors of another shape or type than the architecture and its delta say" in text
    assert "conv1.weight is [16, 3, 3, 3], not [8, 3, 3, 3]" in text
    assert "Traceback" not in text
