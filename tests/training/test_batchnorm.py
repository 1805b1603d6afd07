from __future__ import annotations

import pytest
import torch
from torch import nn

from deploycnn.training import batchnorm
from tests.training.support import make_model


def test_statistics_are_the_plain_averages_over_batches() -> None:
    model = make_model()
    norm = model[1]  # type: ignore[index]
    norm.running_mean.fill_(7.0)
    images = [torch.randn(5, 3, 8, 8) for _ in range(3)]
    with torch.no_grad():
        activations = [model[0](batch) for batch in images]  # type: ignore[index]
    means = torch.stack([a.mean((0, 2, 3)) for a in activations]).mean(0)
    variances = torch.stack([a.var((0, 2, 3), unbiased=True) for a in activations]).mean(0)
    assert batchnorm.reestimate(model, images) == 1
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)


def test_nothing_but_statistics_changes() -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    generator = torch.get_rng_state()
    batchnorm.reestimate(model, [torch.ones(4, 3, 8, 8)])
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), generator), "dropout was running"


def test_modes_and_momentum_come_back_when_a_batch_fails() -> None:
    model = make_model()
    with pytest.raises(RuntimeError, match="channels"):
        batchnorm.reestimate(model, [torch.ones(4, 9, 8, 8)])
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1  # type: ignore[index]


def test_single_images_are_left_out() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2))
    batches = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[100.0, 100.0]])]
    assert batchnorm.reestimate(model, batches) == 1
    torch.testing.assert_close(model[1].running_mean, torch.tensor([2.0, 3.0]))


def test_models_without_statistics_are_not_run() -> None:
    def never() -> object:
        raise AssertionError("asked for images")
        yield

    assert batchnorm.reestimate(nn.BatchNorm1d(2, track_running_stats=False), never()) == 0  # type: ignore[arg-type]
