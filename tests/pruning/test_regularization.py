"""Penalties against NumPy, and what they do to channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploycnn.pruning import regularization
from deploycnn.pruning.counting import counted
from deploycnn.pruning.structure import analyse
from tests.pruning import nets
from tests.pruning.test_importance import made, read, weights


def inner_squares(model: torch.nn.Module) -> np.ndarray:  # type: ignore[type-arg]
    w = weights(model)
    bn = w["bn1.weight"] ** 2 + w["bn1.bias"] ** 2
    return made(w["conv1.weight"], 2) + bn + read(w["conv2.weight"], 2)


def test_group_lasso_is_the_sum_of_the_channels_norms() -> None:
    model = nets.lively(nets.Residual())
    (group,) = [group for group in analyse(model, nets.images()).groups if group.name == "conv1"]
    penalty = regularization.group_lasso(model, [group], 0.3)
    norms = np.sqrt(inner_squares(model))
    assert penalty.item() == pytest.approx(0.3 * norms.sum(), rel=1e-5)
    penalty.backward()
    grad = model.conv1.weight.grad.numpy()
    expected = 0.3 * model.conv1.weight.detach().numpy() / norms[:, None, None, None]
    np.testing.assert_allclose(grad, expected, rtol=1e-4)


def test_group_lasso_of_a_dead_channel_has_no_nan() -> None:
    model = nets.lively(nets.Residual())
    groups = analyse(model, nets.images()).groups
    for parameter in model.parameters():
        parameter.data.zero_()
    regularization.group_lasso(model, groups, 1.0).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_growing_pulls_on_the_chosen_channels_only() -> None:
    model = nets.lively(nets.Residual())
    (group,) = [group for group in analyse(model, nets.images()).groups if group.name == "conv1"]
    (mask,) = regularization.smallest(model, [group], 0.25)
    values = inner_squares(model)
    assert set(np.flatnonzero(mask.numpy())) == set(np.argsort(values)[: round(0.25 * group.width)])
    penalty = regularization.growing(model, [group], [mask], 0.5)
    assert penalty.item() == pytest.approx(0.25 * values[mask.numpy() > 0].sum(), rel=1e-5)
    penalty.backward()
    grad = model.conv1.weight.grad
    assert bool((grad[mask == 0] == 0).all())
    torch.testing.assert_close(grad[mask > 0], 0.5 * model.conv1.weight.detach()[mask > 0])


def test_steps_are_counted_in_training_only_and_travel_with_the_state() -> None:
    model = nets.Residual()
    with counted(model) as count:
        model.eval()(nets.images())
        assert count() == 0
        model.train()(nets.images())
        model(nets.images())
        assert count() == 2
        state = model.state_dict()
    assert "pruning_step" not in model.state_dict()
    with counted(model) as count:
        model.load_state_dict(state)
        assert count() == 2
