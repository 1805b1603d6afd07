"""Models in half precision and channels-last, on the CPU, against the float64 model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploycnn.errors import RuntimeUnavailable
from deploycnn.gpu.torch_model import Recast, precision


class Net(nn.Module):
    """Tells what it was given; outputs in a mapping of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.seen: Any = None

    def forward(self, images: torch.Tensor) -> dict[str, Any]:
        self.seen = images
        features = self.conv(images)
        return {"features": [features, features.mean((2, 3))]}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [(("fp16",), torch.float16, 5e-3), (("fp16", "channels-last"), torch.float16, 5e-3),
     (("channels-last",), torch.float32, 1e-5), (("fp32",), torch.float32, 1e-5)],
)  # fmt: skip
def test_it_computes_the_model_in_the_format_asked_for(
    net: Net, options: tuple[str, ...], dtype: torch.dtype, tolerance: float
) -> None:
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 6, 6), dtype=np.float32))
    with torch.no_grad():
        wanted = copy.deepcopy(net).double()(images.double())["features"]
        found = Recast(net, options)(images)["features"]
    assert [item.dtype for item in found] == [torch.float32, torch.float32]
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(have.numpy(), want.numpy(), atol=tolerance)
    assert net.seen.dtype == net.conv.weight.dtype == dtype
    if "channels-last" in options:
        for tensor in (net.seen, net.conv.weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()


def test_contradicting_formats_are_refused(net: Net) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"\+fp16 and \+fp32 contradict"):
        Recast(net, ("fp16", "fp32"))


@pytest.mark.parametrize(
    ("options", "capability", "expected"),
    [((), (9, 0), "tf32"), ((), (7, 5), "f32"), (("fp32",), (9, 0), "f32"), (("fp16", "device"), (7, 5), "f16")],
)  # fmt: skip
def test_what_convolutions_compute_in(
    options: tuple[str, ...], capability: tuple[int, int], expected: str
) -> None:
    assert precision(options, capability) == expected
