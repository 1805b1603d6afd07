from __future__ import annotations

import pytest
import torch
from torch import nn

from deploycnn.errors import PassRequirementError
from deploycnn.tasks import classification

IMAGES = torch.zeros(2, 3, 8, 8)


def test_correct_counts_the_largest_logits() -> None:
    logits_NK = torch.tensor([[0.1, 0.9], [3.0, 2.0], [-1.0, -2.0]])
    assert classification.correct(logits_NK, torch.tensor([1, 1, 0])).item() == 2


class Returns(nn.Module):
    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: torch.Tensor) -> object:
        return self.output


def test_a_model_that_fits_passes() -> None:
    assert classification.check_model(Returns(torch.zeros(2, 4)), IMAGES, 4, "train: the model") is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Returns((torch.zeros(2, 4), None)), "returns tuple, not one tensor of logits"),
        (Returns(torch.zeros(2, 5)), "num_classes: 4"),
        (Returns(torch.zeros(2, 4, 1, 1)), r"returns shape \(4, 1, 1\)"),
        (nn.Conv2d(1, 1, 1), r"does not accept images of shape \(3, 8, 8\)"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(PassRequirementError, match=message) as caught:
        classification.check_model(model, IMAGES, 4, "train: the model")
    assert str(caught.value).startswith("train: the model")
