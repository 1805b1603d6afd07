"""Pruned torchvision and zoo models, and their outputs, for tests of storage."""

from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from deploycnn import registry
from deploycnn.models.artifact import architecture, set_architecture


def build(source: str, options: Mapping[str, Any], num_classes: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = registry.get("source", source).build(options, num_classes)
    set_architecture(model, architecture(source, options, num_classes))
    return model.eval()


def prune(model: nn.Module, ratio: float, size: int, classifier: str, channels: int = 3) -> nn.Module:
    """Torch-Pruning's magnitude pruner on all layers but the classifier."""
    ignored = [model.get_submodule(classifier)]
    image = torch.zeros(1, channels, size, size)
    pruner = tp.pruner.MagnitudePruner(
        model,
        image,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=ignored,
    )
    pruner.step()
    return model


def logits(model: nn.Module, size: int, seed: int = 1) -> torch.Tensor:
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(image)
