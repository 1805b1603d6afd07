"""Random views: against slices of padded images, torchvision and hand arithmetic; and their distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from deploycnn import schema
from deploycnn.data.augment import Augmentation
from deploycnn.data.views import _DRAWS, augment, uniforms
from deploycnn.errors import RecipeError
from tests.data.samples import array_split

INDICES = np.arange(64)
IMAGES = array_split(64, 12, 16).images


def views(
    augmentation: Augmentation, images: np.ndarray = IMAGES, *, seed: int = 1, epoch: int = 0
) -> np.ndarray:
    fill = (1, 2, 3)[: images.shape[3]]
    return augment(images, augmentation, indices=INDICES[: len(images)], seed=seed, epoch=epoch, fill=fill)


EACH = [
    Augmentation(resized_crop=0.5),
    Augmentation(rotation=20),
    Augmentation(rotation=20, padding="zero"),
    Augmentation(crop_padding=3),
    Augmentation(crop_padding=3, padding="zero"),
    Augmentation(horizontal_flip=True),
    Augmentation(brightness=0.3),
    Augmentation(contrast=0.3),
    Augmentation(saturation=0.3),
    Augmentation(erasing=1.0),
]


@pytest.mark.parametrize("augmentation", EACH)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_changes_images_reproducibly_and_leaves_its_input_alone(
    augmentation: Augmentation, channels: int
) -> None:
    images = np.ascontiguousarray(IMAGES[..., :channels])
    before = images.copy()
    result = views(augmentation, images)
    np.testing.assert_array_equal(images, before)
    assert result.dtype == np.uint8
    assert result.shape == images.shape
    np.testing.assert_array_equal(result, views(augmentation, images))
    if channels == 1 and augmentation.saturation:
        np.testing.assert_array_equal(result, images)
        return
    assert augmentation.active
    assert not np.array_equal(result, images)
    assert not np.array_equal(result, views(augmentation, images, epoch=1))
    assert not np.array_equal(result, views(augmentation, images, seed=2))
    # One image alone gets the same view as in a batch.
    one = augment(
        images[9:10], augmentation, indices=INDICES[9:10], seed=1, epoch=0, fill=(1, 2, 3)[:channels]
    )
    np.testing.assert_array_equal(one[0], result[9])


def test_nothing_is_done_by_default() -> None:
    assert not Augmentation().active
    assert views(Augmentation()) is IMAGES


@pytest.mark.parametrize(("padding", "mode"), [("reflect", "reflect"), ("zero", "constant")])
def test_a_shift_is_a_slice_of_the_padded_image(padding: str, mode: str) -> None:
    result = views(Augmentation(crop_padding=2, horizontal_flip=True, padding=padding))
    seen = set()
    for image, view in zip(IMAGES, result, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=mode)
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if np.array_equal(padded[top : top + 12, left : left + 16][:, :: -1 if flip else 1], view)
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 30
    assert {flip for *_, flip in seen} == {False, True}


def test_a_warp_is_a_linear_map_of_a_box_of_the_declared_size() -> None:
    # Colours that say where a pixel came from.
    y, x = np.mgrid[0:48, 0:64]
    image = np.stack([x * 3, y * 5, (x + y) * 2], axis=2).astype(np.uint8)
    images = np.repeat(image[None], 64, axis=0)
    augmentation = Augmentation(resized_crop=0.3)
    result = views(augmentation, images)
    # Reconstruct the box from the ramps: red rises 3 a column, green 5 a row.
    for view in result[:16].astype(float):
        left, right = view[24, 8, 0] / 3, view[24, 56, 0] / 3
        top, bottom = view[8, 32, 1] / 5, view[40, 32, 1] / 5
        box_w, box_h = (right - left) / 48 * 64, (bottom - top) / 32 * 48
        assert 0.25 <= box_w * box_h / (48 * 64) <= 1.02
        assert 0.7 <= (box_w / 64) / (box_h / 48) <= 1.43
        corner_x, corner_y = left - 8.5 * box_w / 64 + 0.5, top - 8.5 * box_h / 48 + 0.5
        grid_x = corner_x + (np.arange(64) + 0.5) * box_w / 64 - 0.5
        grid_y = corner_y + (np.arange(48) + 0.5) * box_h / 48 - 0.5
        assert np.abs(view[24, 4:60, 0] - 3 * grid_x[4:60]).max() < 2.0
        assert np.abs(view[8:40, 32, 1] - 5 * grid_y[8:40]).max() < 2.5


@pytest.mark.parametrize("angle", [10.0, 45.0])
def test_rotation_agrees_with_torchvision(angle: float) -> None:
    y, x = np.mgrid[0:33, 0:33]
    image = (127 + 60 * np.sin(x / 5) + 60 * np.cos(y / 7)).astype(np.uint8)[..., None].repeat(3, axis=2)
    images = np.repeat(image[None], 64, axis=0)
    result = views(Augmentation(rotation=angle, padding="zero"), images)
    random = uniforms(1, 0, INDICES)["angle"]
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for view, number in zip(result[:8], random[:8], strict=True):
        # Ours turns the sampling grid, so the picture turns the other way; torchvision's angle is
        # counter-clockwise.
        expected = v2.functional.rotate(
            tensor, angle * (2 * number - 1), interpolation=v2.InterpolationMode.BILINEAR
        )
        inner = slice(8, 25)
        difference = np.abs(view[inner, inner].astype(int) - expected.permute(1, 2, 0).numpy()[inner, inner])
        assert difference.max() <= 3


def test_a_reflected_rotation_shows_no_black_corner() -> None:
    images = np.full((64, 12, 16, 3), 200, np.uint8)
    assert views(Augmentation(rotation=45), images).min() == 200
    assert views(Augmentation(rotation=45, padding="zero"), images).min() == 0


def test_colors_agree_with_hand_arithmetic() -> None:
    factor = 1 + 0.4 * (2 * uniforms(1, 0, INDICES)["brightness"] - 1)
    expected = np.minimum(255, IMAGES * factor[:, None, None, None])
    assert np.abs(views(Augmentation(brightness=0.4)) - np.rint(expected)).max() <= 1
    tensor = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    pairs = [("contrast", v2.functional.adjust_contrast), ("saturation", v2.functional.adjust_saturation)]
    for name, reference in pairs:
        factors = 1 + 0.4 * (2 * uniforms(1, 0, INDICES)[name] - 1)
        result = views(Augmentation(**{name: 0.4}))
        for image, view, strength in zip(tensor, result, factors.tolist(), strict=True):
            theirs = reference(image, strength).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(view.astype(int) - theirs).max() <= 2


def test_erasing_fills_one_box_of_the_declared_area() -> None:
    images = np.full((64, 32, 32, 3), 100, np.uint8)
    result = views(Augmentation(erasing=0.5, erasing_area=0.2), images)
    erased = (result == (1, 2, 3)).all(axis=3)
    assert (result[~erased] == 100).all()
    hit = erased.any(axis=(1, 2))
    assert 20 <= hit.sum() <= 44
    for mask in erased[hit]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert 0.015 <= mask.mean() <= 0.25


def test_random_numbers_are_uniform_and_independent() -> None:
    values = np.stack([uniforms(0, 0, np.arange(20_000))[name] for name in _DRAWS])
    assert values.min() >= 0
    assert values.max() < 1
    # Kolmogorov-Smirnov at about p = 1e-4 each, correlation at about 5 sigma.
    grid = np.arange(1, 20_001) / 20_000
    assert np.abs(np.sort(values, axis=1) - grid).max() < 2.2 / np.sqrt(20_000)
    correlation = np.corrcoef(values) - np.eye(len(_DRAWS))
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)
    for other in (uniforms(1, 0, np.arange(20_000)), uniforms(0, 1, np.arange(20_000))):
        assert abs(np.corrcoef(values[0], other["flip"])[0, 1]) < 5 / np.sqrt(20_000)


def test_random_numbers_are_the_same_for_ever() -> None:
    # Artifacts are keyed by recipe and seed: other numbers would silently give other weights under the same
    # key.
    flips = uniforms(7, 3, np.array([0, 1, 123_456]))["flip"]
    state = 7
    for counter in (None, 4, 123_456):
        state = _splitmix(state if counter is None else state ^ counter)
    expected = (_splitmix(state + 0x9E3779B97F4A7C15) >> 11) * 2.0**-53
    assert flips[2] == expected


def _splitmix(value: int) -> int:
    """SplitMix64's next number after the state ``value``, in plain Python."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_splitmix_has_the_published_values() -> None:
    # First outputs of the reference implementation for the seed 1234567.
    state, golden, mask = 1234567, 0x9E3779B97F4A7C15, (1 << 64) - 1
    outputs = [_splitmix((state + step * golden) & mask) for step in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    "raw",
    [{"resized_crop": 0}, {"rotation": 181}, {"crop_padding": -1}, {"padding": "edge"}, {"brightness": 1},
    {"erasing": 1.1},
     {"erasing_area": 0}, {"flip": True}],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(raw: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(raw))):
        schema.build(Augmentation, raw, "train.augment")
