"""Image classification: what the outputs mean and how good they are.

Legend: N images, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploycnn.errors import PassRequirementError


def correct(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """How many of N images have their label's logit as the largest: an int64 scalar on the logits' device."""
    return (logits_NK.argmax(dim=1) == labels_N).sum()


def check_model(model: nn.Module, images_NCHW: Tensor, num_classes: int, where: str) -> None:
    """Check that ``model`` maps images to one logit per class.

    Args:
        model: In evaluation mode, on the images' device.
        images_NCHW: A few images as the data give them.
        num_classes: Of the data.
        where: What the model is called in messages ("train: the model").

    Raises:
        PassRequirementError: it does not accept such images, or does not return one tensor (N, num_classes).
    """
    size = tuple(images_NCHW.shape[1:])
    try:
        with torch.inference_mode():
            output = model(images_NCHW)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PassRequirementError(
            f"{where} does not accept images of shape {size} (channels, height, width): {reason}; "
            "change `preprocessing` to what it was made for"
        ) from error
    if not isinstance(output, Tensor):
        raise PassRequirementError(
            f"{where} returns {type(output).__name__}, not one tensor of logits; "
            "switch its auxiliary outputs off"
        )
    if output.ndim != 2 or output.shape[1] != num_classes:
        raise PassRequirementError(
            f"{where} returns shape {tuple(output.shape[1:])}, the data have {num_classes} classes; "
            f"give its source `num_classes: {num_classes}`, or choose the data that it was made for"
        )
