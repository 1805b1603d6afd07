"""Engines that may not run here, and GPUs that are too small: `pytest -m gpu`, and simulated by default."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from deploycnn.engines import vouch
from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.gpu import device as gpu_device
from tests.engines import graphs
from tests.gpu import on_gpu
from tests.gpu.on_gpu import TOLERANCE, assert_close, expected, images, opened


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"version": "0.0.1"}, "built by"), ({"gpu": "NVIDIA Other", "capability": "1.0"}, "built for")],
)  # fmt: skip
def test_engines_from_elsewhere_are_refused_before_they_are_loaded(
    changed: dict[str, str], message: str, plain_trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    made = on_gpu.engine(graphs.net(), tmp_path, plain_trt, here)
    manifest = made.path.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    content["facts"]["record"]["engine"] |= changed
    manifest.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=message):
        opened(made, plain_trt)


def test_an_rtx_engine_for_another_gpu_is_refused_by_us_and_by_the_library(
    real_rtx: Flavour, here: Gpu, tmp_path: Path
) -> None:
    rtx = real_rtx
    ours = f"{here.capability[0]}.{here.capability[1]}"
    other = next(name for name in reversed(rtx.capabilities) if name != ours)
    made = on_gpu.engine(graphs.net(), tmp_path, rtx, here, compute_capabilities=(other,))
    with pytest.raises(ArtifactError, match=f"built for compute capability {other}, but this GPU is"):
        opened(made, rtx)
    with pytest.raises(ArtifactError, match=r"x\.engine"):
        rtx.deserialize(made.path.read_bytes(), what="x.engine")


def test_tampered_and_foreign_files_are_refused(trt: Flavour, here: Gpu, tmp_path: Path) -> None:
    made = on_gpu.engine(graphs.net(), tmp_path, trt, here)
    plan = made.path.read_bytes()
    made.path.write_bytes(plan[:-1] + bytes([plan[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="changed since it was made"):
        opened(made, trt)
    made.path.with_name("manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no manifest beside it vouches"):
        opened(made, trt)
    made.path.write_bytes(bytes(4096))
    with pytest.raises(ArtifactError, match="not an engine of|does not load it|another version"):
        opened(made, trt, "trust")
    made.path.write_bytes(plan)
    given = images(2)
    assert_close(opened(made, trt, "trust").run(given)[0], expected(graphs.net(), given), TOLERANCE["fp32"])


def test_device_memory_that_does_not_suffice_is_an_error_of_one_line(
    trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    made = on_gpu.engine(graphs.net(), tmp_path, trt, here, batch=(1, 1, 16384))
    session = opened(made, trt)
    taken = gpu_device.open_device()
    hold = []
    for size in (2**30, 2**26):  # down to less than the engine's own buffers take
        while taken.memory_bytes()[0] > size + 2**25:
            try:
                hold.append(taken.allocate(size))
            except RuntimeUnavailable:
                break
    with pytest.raises((ArtifactError, RuntimeUnavailable), match="out of device memory") as caught:
        session.run(np.zeros((16384, 8, 12, 12), np.float32))
    assert "\n" not in str(caught.value)
    hold.clear()
    given = images(2)
    assert_close(opened(made, trt).run(given)[0], expected(graphs.net(), given), TOLERANCE["fp32"])


def test_the_record_says_where_it_was_built(plain_trt: Flavour, here: Gpu, tmp_path: Path) -> None:
    made = on_gpu.engine(graphs.net(), tmp_path, plain_trt, here)
    record = vouch.read_record(made.path)
    assert record is not None
    assert (record.gpu, record.capability) == (here.name, f"{here.capability[0]}.{here.capability[1]}")
    vouch.check_fits(record, "x", plain_trt, here)
    with pytest.raises(ArtifactError, match="built for"):
        vouch.check_fits(record, "x", plain_trt, dataclasses.replace(here, name="NVIDIA Other"))
