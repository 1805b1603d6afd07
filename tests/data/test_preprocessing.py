"""Resizing against Pillow and torchvision, scaling against float64 NumPy; a declaration that survives."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import v2

from deploycnn import schema
from deploycnn.data.geometry import letterbox_size
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.errors import PreprocessingError, RecipeError
from tests.data.samples import MixedSplit, array_split, picture

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
}
SHAPES = [(8, 8), (37, 53), (53, 37), (1, 40), (40, 1), (1, 1), (64, 64), (500, 333)]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_squash_is_pillows_resize(shape: tuple[int, int], interpolation: str) -> None:
    image = picture(1, *shape)
    declared = Preprocessing(size=(24, 32), scale="unit", interpolation=interpolation)
    expected = np.asarray(Image.fromarray(image).resize((32, 24), FILTERS[interpolation]))
    np.testing.assert_array_equal(declared.resize_image(image), expected)


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (64, 64), (500, 333), (256, 300), (225, 224)])
@pytest.mark.parametrize(("size", "ratio", "side"), [(32, 1.0, 32), (224, 0.875, 256), (28, 0.875, 32)])
def test_center_crop_is_torchvisions_resize_and_crop(
    shape: tuple[int, int], size: int, ratio: float, side: int
) -> None:
    image = picture(2, *shape)
    reference = v2.Compose([v2.Resize(side), v2.CenterCrop(size)])
    declared = Preprocessing(size=(size, size), resize="center_crop", crop_ratio=ratio, scale="unit")
    np.testing.assert_array_equal(declared.resize_image(image), np.asarray(reference(Image.fromarray(image))))


@given(
    source=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resize=st.sampled_from(["squash", "letterbox", "center_crop"]),
    ratio=st.sampled_from([1.0, 0.875, 0.5]),
    channels=st.sampled_from(["rgb", "bgr", "gray"]),
)
@settings(max_examples=150, deadline=None)
def test_any_image_gets_the_declared_shape(
    source: tuple[int, int], target: tuple[int, int], resize: str, ratio: float, channels: str
) -> None:
    ratio = ratio if resize == "center_crop" else 1.0
    declared = Preprocessing(size=target, resize=resize, crop_ratio=ratio, channels=channels, scale="unit")
    assert declared.resize_image(picture(0, *source)).shape == (*target, declared.channel_count)
    assert declared.apply(picture(0, *source)).shape == declared.input_shape


@pytest.mark.parametrize("shape", SHAPES)
def test_letterbox_shows_the_whole_image_and_pads_the_rest(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 200, np.uint8)
    declared = Preprocessing(size=(20, 30), resize="letterbox", pad_value=7, scale="unit")
    result = declared.resize_image(image)
    height, width = letterbox_size(shape, (20, 30))
    inside = (result == 200).all(axis=2)
    assert inside.sum() == height * width
    assert (result[~inside] == 7).all()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    assert abs(rows[0] - (19 - rows[-1])) <= 1
    assert abs(columns[0] - (29 - columns[-1])) <= 1
    assert height == 20 or width == 30


def test_letterbox_agrees_with_pillows_pad() -> None:
    image = picture(3, 40, 80)
    expected = ImageOps.pad(Image.fromarray(image), (32, 32), Image.Resampling.BILINEAR, color=(114,) * 3)
    result = Preprocessing(size=(32, 32), resize="letterbox", scale="unit").resize_image(image)
    np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("resize", ["squash", "letterbox", "center_crop"])
def test_an_image_of_the_right_size_is_left_alone(resize: str) -> None:
    image = picture(4, 16, 24)
    np.testing.assert_array_equal(Preprocessing(size=(16, 24), resize=resize).resize_image(image), image)


def test_a_crop_ratio_below_one_also_cuts_an_image_of_the_right_size() -> None:
    image = picture(4, 16, 16)
    declared = Preprocessing(size=(16, 16), resize="center_crop", crop_ratio=0.5)
    assert not np.array_equal(declared.resize_image(image), image)


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("scale", ["unit", "signed", "standardize"])
def test_scaling_is_the_rounded_float64_result(channels: str, scale: str) -> None:
    count = 1 if channels == "gray" else 3
    mean, std = np.array([0.485, 0.456, 0.406])[:count], np.array([0.229, 0.224, 0.225])[:count]
    statistics = {"mean": tuple(mean), "std": tuple(std)} if scale == "standardize" else {}
    declared = Preprocessing(size=(16, 16), scale=scale, channels=channels, **statistics)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, count), dtype=np.uint8)
    values = pixels.astype(np.float64) / 255
    if channels == "bgr":
        values = values[..., ::-1]
    expected = {"unit": values, "signed": values * 2 - 1, "standardize": (values - mean) / std}[scale]
    result = declared.normalize(pixels)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected.astype(np.float32).transpose(0, 3, 1, 2))


def test_it_agrees_with_torchvision_on_an_imagenet_model() -> None:
    image = picture(5, 300, 400)
    declared = Preprocessing(size=(224, 224), resize="center_crop", crop_ratio=0.875, **IMAGENET)
    picture_ = v2.CenterCrop(224)(v2.Resize(256)(Image.fromarray(image)))
    unit = v2.functional.to_dtype(v2.functional.to_image(picture_), scale=True)
    tensor = v2.functional.normalize(unit, list(IMAGENET["mean"]), list(IMAGENET["std"]))
    np.testing.assert_allclose(declared.apply(image), tensor.numpy(), rtol=0, atol=2e-6)


def test_gray_is_pillows_luma() -> None:
    image = picture(6, 20, 20)
    result = Preprocessing(size=(20, 20), channels="gray", scale="unit").resize_image(image)
    np.testing.assert_array_equal(result[..., 0], np.asarray(Image.fromarray(image).convert("L")))


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("resize", ["squash", "letterbox", "center_crop"])
def test_statistics_are_those_of_the_training_pixels(channels: str, resize: str) -> None:
    train = MixedSplit(40)
    declared = Preprocessing(size=(12, 16), channels=channels, resize=resize)
    resolved = declared.resolve(train)
    pixels = np.stack([declared.resize_image(train.decode(i)) for i in range(40)]).astype(np.float64) / 255
    if channels == "bgr":
        pixels = pixels[..., ::-1]
    np.testing.assert_allclose(resolved.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(resolved.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)
    inputs = np.stack([resolved.apply(train.decode(i)) for i in range(40)])
    np.testing.assert_allclose(inputs.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(inputs.std(axis=(0, 2, 3)), 1, atol=1e-5)


def test_statistics_look_at_every_image_of_train_once() -> None:
    train = MixedSplit(300)
    Preprocessing(size=(4, 4)).resolve(train)
    assert sorted(train.decoded) == list(range(300))


def test_given_statistics_are_kept() -> None:
    train = MixedSplit(3)
    declared = Preprocessing(size=(4, 4), **IMAGENET)
    assert declared.resolve(train) is declared
    assert Preprocessing(scale="unit").resolve(train).mean is None
    assert train.decoded == []


def test_a_constant_channel_cannot_be_standardized() -> None:
    train = array_split(4)
    train.images[..., 1] = 77
    with pytest.raises(PreprocessingError, match="use scale: unit"):
        Preprocessing(size=(8, 8)).resolve(train)


def test_unresolved_statistics_are_our_bug() -> None:
    with pytest.raises(ValueError, match="resolve"):
        Preprocessing(size=(8, 8)).apply(picture(0))


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)]
)
def test_other_arrays_are_our_bug(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        Preprocessing(size=(8, 8), scale="unit").apply(image)


values = st.floats(0, 1, allow_nan=False).filter(lambda value: value > 1e-6)


@given(
    mean=st.lists(values, min_size=3, max_size=3),
    std=st.lists(values, min_size=3, max_size=3),
    size=st.tuples(st.integers(1, 999), st.integers(1, 999)),
    channels=st.sampled_from(["rgb", "bgr"]),
)
@settings(max_examples=100, deadline=None)
def test_json_round_trip_is_exact(
    mean: list[float], std: list[float], size: tuple[int, int], channels: str
) -> None:
    declared = Preprocessing(size=size, mean=tuple(mean), std=tuple(std), channels=channels)
    again = Preprocessing.from_json(json.loads(json.dumps(declared.to_json())))
    assert again == declared
    assert again.fingerprint == declared.fingerprint
    assert schema.build(Preprocessing, declared.to_json(), "r") == declared
    declared.check_same(json.loads(json.dumps(declared.to_json())), "model")


OTHERS = [
    {"size": (8, 9)},
    {"resize": "letterbox"},
    {"resize": "letterbox", "pad_value": 0},
    {"resize": "center_crop"},
    {"resize": "center_crop", "crop_ratio": 0.9},
    {"scale": "unit", "mean": None, "std": None},
    {"scale": "signed", "mean": None, "std": None},
    {"mean": (0.485, 0.456, math.nextafter(0.406, 1))},
    {"std": (0.229, 0.224, 0.226)},
    {"channels": "bgr"},
    {"interpolation": "bicubic"},
]


def test_any_difference_changes_the_fingerprint_and_is_refused() -> None:
    base = Preprocessing(size=(8, 8), **IMAGENET)
    everything = [base, *(dataclasses.replace(base, **change) for change in OTHERS)]
    assert len({item.fingerprint for item in everything}) == len(everything)
    for change, other in zip(OTHERS, everything[1:], strict=True):
        with pytest.raises(PreprocessingError, match=next(iter(change))) as caught:
            base.check_same(other.to_json(), "model.onnx")
        assert str(caught.value).startswith("model.onnx: ")
        assert "\n" not in str(caught.value)


def test_an_unknown_origin_passes() -> None:
    Preprocessing().check_same(None, "model.onnx")
    with pytest.raises(PreprocessingError, match=r"model\.onnx: should be a mapping"):
        Preprocessing().check_same("resize", "model.onnx")


WRONG = [
    ({"sise": 32}, 'sise: unknown key; did you mean "size"'),
    ({"size": 0}, "size"),
    ({"size": [32]}, "size"),
    ({"size": [32, 32.0]}, "size"),
    ({"size": "32"}, "size"),
    ({"size": True}, "size"),
    ({"size": 100_000}, "size"),
    ({"resize": "stretch"}, "resize"),
    ({"scale": "standardise"}, "scale"),
    ({"channels": "BGR"}, "channels"),
    ({"interpolation": 3}, "interpolation"),
    ({"mean": [0.5, 0.5, 0.5]}, "mean and std"),
    ({"mean": [0.5], "std": [0.5]}, "mean should have 3 values"),
    ({"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}, "std should be > 0"),
    ({"mean": ["a"] * 3, "std": [1, 1, 1]}, "mean"),
    ({"scale": "unit", "mean": [0.5] * 3, "std": [0.5] * 3}, "scale: standardize"),
    ({"channels": "gray", "mean": [0.5] * 3, "std": [0.5] * 3}, "mean should have 1 value"),
    ({"pad_value": 0}, "resize: letterbox"),
    ({"resize": "letterbox", "pad_value": 256}, "pad_value"),
    ({"crop_ratio": 0.9}, "resize: center_crop"),
    ({"resize": "center_crop", "crop_ratio": 1.5}, "crop_ratio"),
    ({"mean": [0.5, 0.5, float("nan")], "std": [1, 1, 1]}, "mean"),
]


@pytest.mark.parametrize(("raw", "message"), WRONG)
def test_wrong_values_are_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(PreprocessingError, match=message) as caught:
        Preprocessing.from_json(raw, "recipe: preprocessing")
    assert str(caught.value).startswith("recipe: preprocessing")
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"recipe: preprocessing"):
        schema.build(Preprocessing, raw, "recipe: preprocessing")


def test_one_number_is_a_square() -> None:
    assert schema.build(Preprocessing, {"size": 32}, "r").size == (32, 32)
    assert Preprocessing.from_json({"size": 32}).size == (32, 32)
    assert schema.build(Preprocessing, {"size": [24, 32]}, "r").size == (24, 32)


def test_a_recipe_is_laid_over_a_datasets_default() -> None:
    base = Preprocessing(size=(64, 64), resize="letterbox", pad_value=0, **IMAGENET)
    assert base.merged({}) == base
    assert base.merged({"size": 32}) == dataclasses.replace(base, size=(32, 32))
    assert base.merged({"scale": "signed"}).mean is None
    assert base.merged({"resize": "squash"}).pad_value == 114
    assert base.merged({"channels": "gray"}).resolved is False
    with pytest.raises(PreprocessingError, match="sizes"):
        base.merged({"sizes": 3})


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from deploycnn.data import preprocessing, digits, imagefolder, cifar10, augment; "
        "print([m for m in ('numpy', 'PIL', 'torch', 'sklearn', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
