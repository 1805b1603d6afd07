from __future__ import annotations

import pytest
import torch
from torch import nn

from deploycnn.training import optimizers
from tests.training.support import make_model


def test_norms_and_biases_are_not_decayed() -> None:
    model = make_model()
    decayed, plain = optimizers.parameter_groups(model, 0.1)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(8, 3, 3, 3), (3, 128)]  # type: ignore[attr-defined]
    assert [tuple(parameter.shape) for parameter in plain["params"]] == [(8,), (8,), (3,)]  # type: ignore[attr-defined]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_all_are_decayed_on_request() -> None:
    model = make_model()
    (group,) = optimizers.parameter_groups(model, 0.1, decay_all=True)
    assert (len(group["params"]), group["weight_decay"]) == (5, 0.1)  # type: ignore[arg-type]
    assert build(model, "sgd", decay_all=True).param_groups[0]["weight_decay"] == 0.01


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = optimizers.parameter_groups(model, 0.1)
    assert group["params"] == [model.weight]


def build(model: nn.Module, name: str, **options: object) -> torch.optim.Optimizer:
    defaults = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    return optimizers.build(model, name, **{**defaults, **options})  # type: ignore[arg-type]


def test_sgd_takes_the_steps_of_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build(model, "sgd")
    weight, velocity = 2.0, 0.0
    for gradient in (0.5, -1.0, 0.25):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        decayed = gradient + 0.01 * weight
        velocity = 0.9 * velocity + decayed
        weight -= 0.1 * (decayed + 0.9 * velocity)
        assert model.weight.item() == pytest.approx(weight, rel=1e-5)


def test_adamw_decays_apart_from_the_gradient() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build(model, "adamw")
    model.weight.grad = torch.full((1, 1), 0.5)
    optimizer.step()
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.01) - 0.1, rel=1e-5)


def test_sgd_without_momentum_needs_no_nesterov() -> None:
    assert build(nn.Linear(1, 1), "sgd", momentum=0.0).param_groups[0]["nesterov"] is False
