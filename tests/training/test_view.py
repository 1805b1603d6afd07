"""Mixup and cutmix against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploycnn.training import feed
from deploycnn.training.view import View, mixed
from tests.training.support import make_data, settings


def batch(count: int = 6, side: int = 8) -> View:
    images = torch.arange(count).float()[:, None, None, None].expand(count, 3, side, side).contiguous()
    return View(images=images, labels=torch.arange(count))


def test_nothing_is_mixed_by_default() -> None:
    view = batch()
    assert mixed(view, settings(), seed=0, epoch=1, step=0) is view


@pytest.mark.parametrize("step", range(5))
def test_mixup_blends_images_as_their_labels(step: int) -> None:
    view = mixed(batch(), settings(mixup=0.8), seed=0, epoch=1, step=step)
    assert view.others is not None
    expected = view.share * np.arange(6) + (1 - view.share) * view.others.numpy()
    np.testing.assert_allclose(view.images[:, 1, 3, 4].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert sorted(view.others.tolist()) == list(range(6))
    assert torch.equal(view.labels, torch.arange(6))
    assert view.main_labels is (view.labels if view.share >= 0.5 else view.others)


@given(seed=st.integers(0, 2**31), step=st.integers(0, 1000), side=st.integers(1, 33))
@hypothesis_settings(max_examples=60, deadline=None)
def test_cutmix_shares_are_those_of_the_area(seed: int, step: int, side: int) -> None:
    original = batch(5, side)
    view = mixed(original, settings(cutmix=1.0), seed=seed, epoch=1, step=step)
    assert view.others is not None
    assert torch.equal(original.images[:, 0, 0, 0], torch.arange(5).float())  # left as it was
    for image, label, other in zip(view.images, view.labels, view.others, strict=True):
        own = (image == float(label)).float().mean().item() if label != other else view.share
        assert own == pytest.approx(view.share)
        assert set(image.unique().tolist()) <= {float(label), float(other)}
        pasted = (image[0] == float(other)).nonzero() if label != other else image[0].nonzero()[:0]
        if len(pasted):  # a box
            height, width = (pasted.max(dim=0).values - pasted.min(dim=0).values + 1).tolist()
            assert height * width == len(pasted)


def test_shares_follow_the_beta_distribution() -> None:
    shares = [
        mixed(batch(2, 2), settings(mixup=0.4), seed=0, epoch=1, step=step).share for step in range(3000)
    ]
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * 1.8), rel=0.08)


def test_where_both_are_on_half_of_the_batches_get_each() -> None:
    both = settings(mixup=0.4, cutmix=1.0)
    views = [mixed(batch(), both, seed=0, epoch=1, step=step) for step in range(400)]
    cut = sum(bool((view.images == view.images.round()).all()) for view in views)
    assert 150 < cut < 250


def test_it_depends_on_seed_epoch_and_step_alone() -> None:
    def share(**place: int) -> float:
        return mixed(batch(), settings(mixup=0.4), **{"seed": 0, "epoch": 1, "step": 2, **place}).share

    assert share() == share()
    assert len({share(), share(seed=1), share(epoch=2), share(step=3)}) == 4


def test_an_epochs_views_are_the_same_again_and_say_what_is_flipped() -> None:
    data = make_data()
    options = settings(augment=settings().augment.__class__(horizontal_flip=True), mixup=0.2)
    first, second = (list(feed.train_views(data, options, seed=3, epoch=2, device="cpu")) for _ in range(2))
    assert all(
        torch.equal(a.images, b.images) and a.share == b.share for a, b in zip(first, second, strict=True)
    )
    plain = settings(augment=options.augment)
    for view in feed.train_views(data, plain, seed=3, epoch=2, device="cpu"):
        assert view.indices is not None
        assert view.flipped is not None
        for image, index, flipped in zip(view.images, view.indices, view.flipped, strict=True):
            pixels = data.dataset.train.decode(int(index)).astype(np.float32) / 255
            expected = pixels[:, ::-1] if flipped else pixels
            np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
        assert 0 < view.flipped.sum() < len(view.flipped) or len(view.flipped) == 1
