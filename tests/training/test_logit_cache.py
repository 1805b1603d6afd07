from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploycnn.data.augment import Augmentation
from deploycnn.training import logit_cache
from deploycnn.training.logit_cache import LogitCache, fits, views_of
from deploycnn.training.view import View
from tests.training.support import settings

# Whole numbers, whose sums are exact in any order.
IMAGES = torch.randint(-9, 10, (10, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()


class Counting(nn.Module):
    """A teacher that counts its batches; ``noise`` makes it depend on what came before."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.calls, self.sizes, self.noise = 0, set[int](), noise

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.add(len(images))
        return images.mean((2, 3)) + self.noise * self.calls


def view(indices: list[int], flipped: list[bool] | None = None) -> View:
    images = IMAGES[indices].clone()
    if flipped is not None:
        images[torch.tensor(flipped)] *= -2
    return View(
        images=images,
        labels=torch.zeros(len(indices), dtype=torch.int64),
        indices=np.array(indices),
        flipped=None if flipped is None else np.array(flipped),
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"augment": Augmentation()}, 1),
        ({"augment": Augmentation(horizontal_flip=True)}, 2),
        ({"augment": Augmentation(crop_padding=1)}, None),
        ({"augment": Augmentation(horizontal_flip=True, erasing=0.1)}, None),
        ({"augment": Augmentation(), "mixup": 0.1}, None),
        ({"augment": Augmentation(horizontal_flip=True), "cutmix": 1.0}, None),
    ],
)
def test_where_views_come_again(options: dict[str, object], expected: int | None) -> None:
    assert views_of(settings(**options)) == expected


def test_memory_is_bounded() -> None:
    assert fits(50_000, 10, 2)
    assert not fits(1_300_000, 1000, 1)
    assert LogitCache(1_300_000, 1000, 2, 8, keep=False)._logits.numel() == 0


def test_known_views_are_not_computed_again() -> None:
    teacher, cache = Counting(), LogitCache(10, 3, 2, 4)
    epochs = [([0, 1, 2, 3], [False] * 4), ([4, 5, 6, 7], [False] * 4), ([8, 9], [False, True])]
    for _ in range(2):
        for indices, flipped in epochs:
            shown = view(indices, flipped)
            assert torch.equal(cache(shown, teacher), shown.images.mean((2, 3)))
    assert teacher.calls == 6  # three to learn, three to check
    for indices, flipped in [([9, 3, 5, 1], [True, False, False, False]), ([0], [False])]:
        shown = view(indices, flipped)
        assert torch.equal(cache(shown, teacher), shown.images.mean((2, 3)))
    assert teacher.calls == 6
    shown = view([9], [False])  # the other view of a known image
    assert torch.equal(cache(shown, teacher), shown.images.mean((2, 3)))
    assert teacher.calls == 7
    assert teacher.sizes == {4}  # small batches are filled up


def test_a_teacher_that_depends_on_the_batch_is_not_remembered() -> None:
    teacher, cache = Counting(noise=1e-3), LogitCache(10, 3, 1, 4)
    first = cache(view([0, 1, 2, 3]), teacher)
    second = cache(view([0, 1, 2, 3]), teacher)
    assert not torch.equal(first, second)
    assert not cache.exact
    for _ in range(logit_cache.CHECKS + 2):
        cache(view([0, 1, 2, 3]), teacher)
    assert teacher.calls == logit_cache.CHECKS + 4


def test_images_without_a_name_are_computed() -> None:
    teacher, cache = Counting(), LogitCache(10, 3, 1, 4)
    for _ in range(6):
        cache(View(images=IMAGES[:2], labels=torch.zeros(2)), teacher)
    assert teacher.calls == 6
