"""The nets and the quantized files that ``quantization.py`` races: ours, and the peers' of the same float model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import save_onnx
from deploycnn.profiling.stopwatch import RuntimeStopwatch
from deploycnn.quantization import packs
from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.job import Job
from deploycnn.quantization.quantize import Options

NETS = (
    "resnet18", "resnet50", "vgg16", "googlenet", "densenet121", "mobilenet_v2", "mobilenet_v3_large",
    "efficientnet_b0", "shufflenet_v2_x1_0", "squeezenet1_1", "alexnet", "regnet_y_400mf", "convnext_tiny",
)  # fmt: skip

SIZE = 224
#: Ranges come from noise: for speed only the kernels matter, and these do not depend on scales.
CALIBRATION_IMAGES = 4

OURS_ORT, OURS_OPENVINO, PEER_ORT, PEER_NNCF = "ours-ort", "ours-openvino", "ort-u8s8", "nncf"
LABELS = {"onnxruntime-cpu": OURS_ORT, "openvino": OURS_OPENVINO}
RUNTIMES = {"onnxruntime-cpu": "onnxruntime:cpu", "openvino": "openvino:f32"}

#: (batch size, threads) at which INT8 must not be slower than float.
Settings = tuple[tuple[int, int], ...]


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)


def random_net(name: str) -> torch.nn.Module:
    """A torchvision net with random weights whose activations neither vanish nor explode.

    Batch norms get the statistics of two batches of noise: with their initial ones, the signal of deep nets fades
    to subnormal numbers, which no real model has and which are slow to compute with.
    """
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    net: torch.nn.Module = torchvision.models.get_model(name, weights=None, **options)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        scale = getattr(module, "layer_scale", None)
        if isinstance(scale, torch.Tensor):
            torch.nn.init.constant_(scale, 0.3)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules()):
        net.train()
        with torch.inference_mode():
            for seed in range(2):
                net(torch.from_numpy(images(8, seed)))
    return net.eval()


def make_float(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    if not path.exists():
        save_onnx(export_onnx(random_net(name), (3, SIZE, SIZE), opset=18), path)
    return path


def make_ours(name: str, target: str, settings: Settings, folder: Path) -> Path:
    """What the int8 pass makes at its defaults; integers throughout where no ``settings`` are given to race at.

    What was raced, and with what outcome, lies beside the model as JSON.
    """
    label = LABELS[target] if settings else f"{LABELS[target]}-throughout"
    path = folder / f"{name}.{label}.onnx"
    if not path.exists():
        record = Job(
            source=make_float(name, folder),
            output=path,
            pack=packs.get(target, detect_isa()),
            options=Options(calibrator="minmax"),
            images=lambda: [images(CALIBRATION_IMAGES)],
            total=CALIBRATION_IMAGES,
            stopwatch=RuntimeStopwatch(runtime=RUNTIMES[target], settings=settings) if settings else None,
            scratch=folder,
            threads=2,
        ).run()
        if record.harm is not None:
            path.with_suffix(".json").write_text(json.dumps(record.harm.to_json(), indent=1))
    return path


def make_onnxruntime_peer(name: str, folder: Path) -> Path:
    """ONNX Runtime's ``quantize_static`` as its guide advises for CPUs: U8S8, per channel, 7 bits without VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / f"{name}.{PEER_ORT}.onnx"
    if path.exists():
        return path
    source = make_float(name, folder)
    prepared = folder / f"{name}.preprocessed.onnx"
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = iter(images(CALIBRATION_IMAGES)[:, None])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=detect_isa().saturates,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()
    return path


def make_nncf_peer(name: str, folder: Path, python: Path) -> Path:
    """NNCF's own result, as OpenVINO IR, made in NNCF's environment."""
    path = folder / f"{name}.{PEER_NNCF}.xml"
    if not path.exists():
        noise = folder / "calibration.npy"
        if not noise.exists():
            np.save(noise, images(CALIBRATION_IMAGES))
        script = Path(__file__).parent / "peers" / "nncf_quantize.py"
        source = make_float(name, folder)
        subprocess.run(
            [str(python), str(script), str(source), str(noise), str(path)], check=True, capture_output=True
        )
    return path
