"""Accuracy of a torch model on a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it
from torch import nn

from deploycnn.data.base import Split
from deploycnn.data.loader import batches
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.tasks import classification
from deploycnn.training.device import images_to, labels_to


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Top-1 in [0, 1] and mean cross-entropy."""

    top1: float
    loss: float

    def better_than(self, other: Score) -> bool:
        """Whether more images are right or (often so on small splits) as many at a lower loss."""
        return (self.top1, -self.loss) > (other.top1, -other.loss)


def evaluate(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: str,
    limit: int | None = None,
) -> Score:
    """Score ``model`` in float32 and evaluation mode, in which it stays.

    Args:
        model: On ``device``; images (N, C, H, W) -> logits (N, K).
        split: Not empty.
        preprocessing: Of the images.
        batch_size: Images at a time.
        device: "cpu" or "cuda".
        limit: On at most so many images, spread evenly.
    """
    model.eval()
    hits = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    seen = 0
    with torch.inference_mode():
        for batch in batches(split, preprocessing, batch_size, limit=limit):
            labels_N = labels_to(batch.labels, device)
            logits_NK = model(images_to(batch.images, device))
            hits += classification.correct(logits_NK, labels_N)
            loss += F.cross_entropy(logits_NK, labels_N, reduction="sum")
            seen += len(batch.labels)
    return Score(top1=hits.item() / seen, loss=loss.item() / seen)
