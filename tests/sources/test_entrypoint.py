import sys

import pytest
import torch

from deploycnn.errors import SourceError
from deploycnn.models.artifact import load_model
from deploycnn.sources.entrypoint import Entrypoint, code_fingerprint
from tests.sources.contexts import context, data_of

CODE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=3, in_channels=3):
        super().__init__(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def net(num_classes=3, in_channels=3):
    return Net(num_classes, in_channels)

def fixed():
    return Net(3)

def anything(**options):
    return Net(**options)

def fails():
    raise KeyError("no such\\nlayer")

def number():
    return 3

class Pair(nn.Module):
    def forward(self, x):
        return x, x

def picture():
    return nn.Identity()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "user_net.py").write_text(CODE)
    monkeypatch.chdir(folder)
    path = list(sys.path)
    yield folder / "user_net.py"
    sys.path[:] = path
    sys.modules.pop("user_net", None)


@pytest.mark.parametrize("function", ["net", "anything", "Net"])
def test_a_users_model(tmp_path, module, function):
    ctx = context(tmp_path, data=data_of(classes=5, channels="gray"))
    draft = Entrypoint(function=f"user_net:{function}").run(ctx)
    assert draft.outputs[0].shape == (None, 5)
    assert draft.inputs[0].shape == (None, 1, 32, 32)
    model = load_model(ctx.output)
    assert type(model).__name__ == "Net"
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_without_data_the_functions_own_defaults_hold(tmp_path, module):
    draft = Entrypoint(function="user_net:fixed").run(context(tmp_path))
    assert draft.outputs[0].shape == (None, 3)
    assert draft.inputs[0].shape == (None, 3, 224, 224)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("user_net", "should be"),
        ("user_nett:net", "no module user_nett; run in the folder"),
        ("user_net:nett", 'has no function "nett"; did you mean "net"'),
        ("user_net:fails", r"fails: KeyError: .*user_net\.py:\d+"),
        ("user_net:number", "returns int; it should return a torch.nn.Module"),
        ("user_net:Pair", "returns tuple; it should return one tensor"),
        ("user_net:picture", r"returns shape \[1, 3, 32, 32\] for one image"),
    ],
)
def test_mistakes_are_one_line(tmp_path, module, function, message):
    with pytest.raises(SourceError, match=message) as caught:
        Entrypoint(function=function, input_size=(32, 32)).run(context(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_class_count_that_the_function_ignores(tmp_path, module):
    with pytest.raises(SourceError, match="returns 3 logits, but there are 4 classes"):
        Entrypoint(function="user_net:fixed").run(context(tmp_path, data=data_of(classes=4)))


def test_a_module_that_does_not_import(tmp_path, module):
    module.write_text("import nothing_of_that_name\n")
    with pytest.raises(SourceError, match="importing it fails: ModuleNotFoundError: .*nothing_of_that_name"):
        Entrypoint(function="user_net:net").run(context(tmp_path))
    module.write_text("1 / 0\n")
    sys.modules.pop("user_net", None)
    with pytest.raises(SourceError, match=r"ZeroDivisionError: .*user_net\.py:1"):
        Entrypoint(function="user_net:net").run(context(tmp_path / "b"))


def test_identity_follows_the_code_without_running_it(module):
    before = Entrypoint(function="user_net:net").extra_identity()
    module.write_text("raise SystemExit\n")
    after = code_fingerprint("user_net")
    assert before != after
    assert "user_net" not in sys.modules
    package = module.parent / "user_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit\n")
    (package / "layers.py").write_text("width = 3\n")
    first = code_fingerprint("user_package.model")
    (package / "layers.py").write_text("width = 4\n")
    assert first != code_fingerprint("user_package.model")
    assert code_fingerprint("no_such_module_anywhere") is None
