"""Averages of weights against float64 NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploycnn.training import checkpoint, loop
from deploycnn.training.ema import Ema
from deploycnn.training.evaluate import evaluate
from deploycnn.training.losses import CrossEntropy
from tests.training.support import make_context, make_data, make_model, same_bits, settings

DATA = make_data()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_that_of_its_formula(decay: float) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    rng = np.random.default_rng(0)
    ema = Ema(model, decay)
    expected = {name: tensor.double().numpy().copy() for name, tensor in model.state_dict().items()}
    for step in range(30):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.from_numpy(rng.normal(size=tensor.shape)))
                else:
                    tensor.add_(1)
        ema.update()
        d = min(decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            value = tensor.double().numpy()
            expected[name] = d * expected[name] + (1 - d) * value if tensor.is_floating_point() else value
    for name, value in expected.items():
        np.testing.assert_allclose(ema.average[name].double().numpy(), value, rtol=2e-5, atol=1e-6)
    assert int(ema.average["1.num_batches_tracked"]) == 30


def test_applied_and_put_back_to_the_bit() -> None:
    model = make_model()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model[0].weight.mul_(3)
    ema.update()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.applied():
        assert all(torch.equal(tensor, ema.average[name]) for name, tensor in model.state_dict().items())
        assert not torch.equal(model[0].weight, own["0.weight"])
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_averaged_weights_are_scored_and_kept(tmp_path: Path, keep: str) -> None:
    model, plain = make_model(), make_model()
    ctx = make_context(tmp_path, DATA)
    history = loop.fit(
        model, DATA, settings(epochs=5, lr=0.05, ema=0.8, keep=keep), loss=CrossEntropy(), ctx=ctx
    )
    score = evaluate(model, DATA.dataset.val, DATA.preprocessing, batch_size=16, device="cpu")
    assert score.top1 == history.kept_val_top1
    state = torch.load(ctx.scratch / checkpoint.FILE, weights_only=True)
    kept = state["progress"]["best_state"] if keep == "best" else state["ema"]["average"]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    # The steps themselves are those of a training without averages.
    other = make_context(tmp_path / "plain", DATA)
    loop.fit(plain, DATA, settings(epochs=5, lr=0.05, keep="last"), loss=CrossEntropy(), ctx=other)
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in plain.state_dict().items())
    assert not same_bits(model, plain)


def test_averaging_begins_with_reestimated_statistics(tmp_path: Path) -> None:
    model = make_model()
    ctx = make_context(tmp_path, DATA)
    loop.fit(
        model,
        DATA,
        settings(epochs=0, reestimate_bn=True, ema=0.9, keep="last"),
        loss=CrossEntropy(),
        ctx=ctx,
    )
    assert not torch.equal(model[1].running_mean, make_model()[1].running_mean)  # type: ignore[index]
