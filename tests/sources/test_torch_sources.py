import json
import subprocess
import sys
import urllib.error

import pytest
import torch
from torchvision import models as torchvision_models

from deploycnn import registry, schema
from deploycnn.core import TensorSpec
from deploycnn.errors import PreprocessingError, SourceError
from deploycnn.models import zoo
from deploycnn.models.artifact import get_architecture, load_model
from deploycnn.models.macs import count_macs, count_params
from deploycnn.sources.checkpoint import Checkpoint
from deploycnn.sources.timm import Timm
from deploycnn.sources.torchvision import Torchvision
from deploycnn.sources.zoo import Zoo
from tests.sources.contexts import context, data_of

TORCH_SOURCES = ("zoo", "torchvision", "timm", "checkpoint", "entrypoint")


def written(ctx):
    return load_model(ctx.output)


def test_no_source_imports_a_heavy_library_at_the_top():
    code = (
        "import sys\nfrom deploycnn import registry\n"
        "for name in registry.names('source'): registry.get('source', name)\n"
        "heavy = {'torch', 'torchvision', 'timm', 'onnx', 'onnxruntime', 'numpy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", [*TORCH_SOURCES, "onnx"])
def test_fields_are_a_schema_with_help(name):
    cls = registry.get("source", name)
    rows = schema.describe(cls)
    assert cls.main in {row[0] for row in rows}
    assert all(row[3] for row in rows)


def test_zoo_draft(tmp_path):
    ctx = context(tmp_path, data=data_of(classes=4, channels="gray"))
    draft = Zoo(name="resnet20").run(ctx)
    assert draft.inputs == (TensorSpec(name="images", dtype="float32", shape=(None, 1, 32, 32)),)
    assert draft.outputs == (TensorSpec(name="logits", dtype="float32", shape=(None, 4)),)
    model = zoo.build("resnet20", num_classes=4, in_channels=1)
    assert draft.facts.params == count_params(model)
    assert draft.facts.macs == count_macs(model, (1, 32, 32))
    assert draft.facts.size_bytes == (ctx.output / "model.safetensors").stat().st_size
    assert draft.facts.preprocessing == ctx.data.preprocessing.to_json()
    assert draft.facts.classes == ("class0", "class1", "class2", "class3")
    assert written(ctx)(torch.zeros(2, 1, 32, 32)).shape == (2, 4)


def test_same_seed_same_weights_and_no_trace_in_the_global_generator(tmp_path):
    torch.manual_seed(9)
    expected = torch.rand(2)
    files = []
    for index, seed in enumerate((3, 3, 4)):
        torch.manual_seed(9)
        ctx = context(tmp_path / str(index), seed=seed)
        Zoo(name="lenet5").run(ctx)
        assert torch.equal(torch.rand(2), expected)
        files.append((ctx.output / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_zoo_loads_weights(tmp_path):
    model = zoo.build("resnet20")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.th")
    ctx = context(tmp_path / "run")
    draft = Zoo(name="resnet20", weights=tmp_path / "w.th").run(ctx)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(written(ctx)(image), model.eval()(image))
    assert draft.facts.record["weights"]["tensors"] == len(model.state_dict())


def test_data_and_fields_must_agree(tmp_path):
    ctx = context(tmp_path, data=data_of(classes=4, size=32))
    with pytest.raises(SourceError, match="num_classes is 10, but the data have 4"):
        Zoo(name="lenet5", num_classes=10).run(ctx)
    with pytest.raises(SourceError, match=r"input_size is \[64, 64\], but preprocessing.size is \[32, 32\]"):
        Zoo(name="resnet20", input_size=(64, 64)).run(ctx)
    assert not list(ctx.output.iterdir())


def test_an_image_size_that_does_not_fit_the_model(tmp_path):
    with pytest.raises(SourceError, match="lenet5: cannot process a 3x64x64 image") as caught:
        Zoo(name="lenet5", input_size=(64, 64)).run(context(tmp_path))
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path):
    for source in (
        Zoo(name="resnet2"),
        Torchvision(name="resnet1"),
        Torchvision(name="fasterrcnn_resnet50_fpn"),
        Timm(name="resnet18x"),
    ):
        ctx = context(tmp_path / type(source).__name__ / source.name)
        with pytest.raises(SourceError, match="unknown"):
            source.run(ctx)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out_of_models_and_checkpoints(tmp_path, name):
    full = torchvision_models.get_model(
        name, weights=None, aux_logits=True, init_weights=False, num_classes=4
    )
    torch.save(full.state_dict(), tmp_path / "w.pt")
    size = 80
    ctx = context(tmp_path / "run")
    draft = Torchvision(name=name, weights=tmp_path / "w.pt", num_classes=4, input_size=(size, size)).run(ctx)
    assert all("aux" in key.lower() for key in draft.facts.record["weights"]["left_out"])
    image = torch.rand(2, 3, size, size)
    model = written(ctx)
    with torch.no_grad():
        assert torch.equal(model(image), full.eval()(image))
        assert isinstance(model.train()(image), torch.Tensor)


def test_torchvision_takes_its_own_image_size_without_data(tmp_path):
    source = Torchvision(name="efficientnet_b1")
    assert source._own_size() == (240, 240)
    assert Torchvision(name="inception_v3")._own_size() == (299, 299)
    draft = Torchvision(name="squeezenet1_1").run(context(tmp_path))
    assert draft.inputs[0].shape == (None, 3, 224, 224)
    assert draft.outputs[0].shape == (None, 1000)


def test_torchvision_refuses_gray_images(tmp_path):
    with pytest.raises(SourceError, match="takes 3 channels, not 1; set preprocessing.channels: rgb"):
        Torchvision(name="resnet18").run(context(tmp_path, data=data_of(channels="gray")))


@pytest.fixture
def published_resnet18(monkeypatch):
    """Stands for the download: weights of 1000 classes from a known seed."""
    torch.manual_seed(7)
    model = torchvision_models.resnet18(weights=None)
    calls = []

    def download(url, *args, **kwargs):
        calls.append((url, kwargs))
        return model.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    return model, calls


def test_default_weights_with_another_class_count_start_a_new_head(tmp_path, published_resnet18):
    model, calls = published_resnet18
    ctx = context(tmp_path, data=data_of(classes=4))
    draft = Torchvision(name="resnet18", weights="default").run(ctx)
    assert draft.facts.record["weights"]["new_head"] == ["fc.weight", "fc.bias"]
    assert draft.facts.record["weights"]["origin"] == "ResNet18_Weights.IMAGENET1K_V1"
    assert calls[0][1]["weights_only"] is True
    assert torch.equal(written(ctx).layer4[1].conv2.weight, model.layer4[1].conv2.weight)
    assert written(ctx).fc.weight.shape == (4, 512)


def test_default_weights_without_data_are_complete(tmp_path, published_resnet18):
    model, _ = published_resnet18
    ctx = context(tmp_path)
    draft = Torchvision(name="resnet18", weights="default", input_size=(64, 64)).run(ctx)
    assert draft.facts.record["weights"]["new_head"] == []
    assert torch.equal(written(ctx).fc.weight, model.fc.weight)


def test_offline_torchvision(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(SourceError, match=r"cannot download https://\S+\.pth .*give weights: PATH") as caught:
        Torchvision(name="resnet18", weights="default").run(context(tmp_path))
    assert "\n" not in str(caught.value)


def test_damaged_download(tmp_path, monkeypatch):
    def damaged(*_, **__):
        raise RuntimeError('invalid hash value (expected "f37072fd", got "00")')

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", damaged)
    with pytest.raises(SourceError, match="is damaged; delete it"):
        Torchvision(name="resnet18", weights="default").run(context(tmp_path))


def test_timm(tmp_path):
    pytest.importorskip("timm")
    ctx = context(tmp_path, data=data_of(classes=4, channels="gray"))
    draft = Timm(name="mobilenetv3_small_050").run(ctx)
    assert draft.inputs[0].shape == (None, 1, 32, 32)
    assert draft.outputs[0].shape == (None, 4)
    assert get_architecture(written(ctx))["source"] == "timm"
    free = Timm(name="mobilenetv3_small_050").run(context(tmp_path / "free"))
    assert free.inputs[0].shape == (None, 3, 224, 224)
    assert free.outputs[0].shape == (None, 1000)


def test_offline_timm(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")

    def offline(*_, **__):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SourceError, match="cannot download the weights"):
        Timm(name="resnet18", weights="default").run(context(tmp_path))


def test_checkpoint_of_a_named_architecture(tmp_path):
    model = zoo.build("lenet5", num_classes=4)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    ctx = context(tmp_path / "run", data=data_of(classes=4))
    Checkpoint(path=tmp_path / "w.pth", architecture="zoo:lenet5").run(ctx)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(written(ctx)(image), model(image))
    assert get_architecture(written(ctx))["source"] == "zoo"


def test_checkpoint_that_is_a_torch_artifact(tmp_path):
    first = context(tmp_path / "first")
    Zoo(name="lenet5", num_classes=4).run(first)
    for index, path in enumerate((first.output, first.output / "model.safetensors")):
        ctx = context(tmp_path / f"again{index}", data=data_of(classes=4))
        Checkpoint(path=path).run(ctx)
        assert (ctx.output / "model.safetensors").read_bytes() == (
            first.output / "model.safetensors"
        ).read_bytes()
    with pytest.raises(SourceError, match="give input_size"):
        Checkpoint(path=first.output).run(context(tmp_path / "sizeless"))
    with pytest.raises(SourceError, match="4 logits, but there are 5 classes"):
        Checkpoint(path=first.output).run(context(tmp_path / "other", data=data_of(classes=5)))


def test_checkpoint_remembers_its_preprocessing(tmp_path):
    first = context(tmp_path / "first", data=data_of(classes=4))
    draft = Zoo(name="lenet5").run(first)
    manifest = {"facts": {"preprocessing": draft.facts.preprocessing, "classes": list(draft.facts.classes)}}
    manifest["inputs"] = [{"shape": [None, 3, 32, 32]}]
    (first.output / "manifest.json").write_text(json.dumps(manifest))
    again = Checkpoint(path=first.output).run(context(tmp_path / "again"))
    assert again.facts.preprocessing == draft.facts.preprocessing
    assert again.facts.classes == draft.facts.classes
    with pytest.raises(PreprocessingError):
        Checkpoint(path=first.output).run(context(tmp_path / "bgr", data=data_of(classes=4, channels="bgr")))


def test_checkpoint_mistakes(tmp_path):
    torch.save(zoo.build("lenet5").state_dict(), tmp_path / "w.pth")
    ctx = context(tmp_path / "run")
    with pytest.raises(SourceError, match="is no torch artifact; name its architecture"):
        Checkpoint(path=tmp_path / "w.pth").run(ctx)
    with pytest.raises(SourceError, match="should be KIND:NAME"):
        Checkpoint(path=tmp_path / "w.pth", architecture="resnet20").run(ctx)
    with pytest.raises(SourceError, match=r"missing tensors \(\d+\).*unexpected tensors \(10\)"):
        Checkpoint(path=tmp_path / "w.pth", architecture="zoo:resnet20").run(ctx)
    assert not list(ctx.output.iterdir())
