"""Does the bridge carry what torchvision's and timm's CNNs export to?

For each model: export (by the dynamo exporter and by the TorchScript exporter), import through the bridge, compare
with onnxruntime on random images at a batch size that the file was not exported with, and check that an untrained
round trip gives back the same bytes. Weights are random.

    python benchmarks/bridge_coverage.py [--models resnet18 timm/regnety_002 ...] [--exporters dynamo script]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from deploycnn.errors import DeployCNNError
from deploycnn.graph.bridge import to_torch
from deploycnn.graph.export import export_onnx
from deploycnn.graph.parity import evaluator

#: torchvision's CNNs are those of its classifiers that are not transformers.
_TRANSFORMERS = ("vit_", "swin_", "maxvit")

TIMM = (
    "cs3darknet_s", "cspresnet50", "convnextv2_atto", "convnext_atto", "coatnet_pico_rw_224", "darknet17",
    "densenet121", "dla34", "dpn48b", "eca_resnet33ts", "edgenext_xx_small", "efficientnet_b0",
    "efficientnetv2_rw_t", "ese_vovnet19b_dw", "fasternet_t0", "fbnetc_100", "fbnetv3_b", "gernet_s",
    "ghostnet_100", "ghostnetv2_100", "gmixer_12_224", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0",
    "hrnet_w18_small", "inception_next_atto", "inception_resnet_v2", "inception_v4", "lcnet_050",
    "legacy_seresnet18", "levit_128s", "mixnet_s", "mnasnet_small", "mobilenetv2_050",
    "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "nf_resnet26",
    "nfnet_l0", "regnetx_002", "regnety_002", "regnetz_b16", "repvgg_a0", "repvit_m0_9", "res2net50_26w_4s",
    "resnest14d", "resnet10t", "resnet18d", "resnetv2_50", "rexnet_100", "selecsls42", "semnasnet_075",
    "seresnext26d_32x4d", "skresnet18", "spnasnet_100", "starnet_s1", "tf_efficientnet_lite0",
    "tf_efficientnetv2_b0", "tinynet_e", "tresnet_m", "vovnet39a", "xception41",
)  # fmt: skip


#: Image sizes that the exporters or the nets ask for; the rest are tried at 96.
_SIZES = {"inception_v3": 128, "alexnet": 224} | dict.fromkeys(
    (f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")), 224
)


def torchvision_names() -> list[str]:
    """Names of torchvision's convolutional classifiers."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not name.startswith(_TRANSFORMERS)]


def build(name: str) -> tuple[nn.Module, int]:
    """A model with random weights, and the image size to try it at."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        plain = name.removeprefix("timm/")
        model = timm.create_model(plain, pretrained=False)
        settings = vars(timm.models.get_pretrained_cfg(plain))
        smallest = settings["min_input_size"] or (3, 0, 0)
        size = settings["input_size"][1] if settings["fixed_input_size"] else max(96, smallest[1])
        return model.eval(), size
    import torchvision

    options = {"init_weights": False} if name in {"inception_v3", "googlenet"} else {}
    return torchvision.models.get_model(name, weights=None, **options).eval(), _SIZES.get(name, 96)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk a lot."""
    logging.disable(logging.WARNING)
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def export(model: nn.Module, size: int, exporter: str) -> onnx.ModelProto:
    if exporter == "dynamo":
        return export_onnx(model, (3, size, size), opset=18)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            path,
            dynamo=False,
            opset_version=14,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            training=torch.onnx.TrainingMode.PRESERVE,  # batch norms stay
            do_constant_folding=False,
        )
        return onnx.load(path)


def try_model(name: str, exporter: str) -> dict[str, object]:
    """One row: relative error (largest over an image's largest logit) and the round trip, or what failed."""
    model, size = build(name)
    row: dict[str, object] = {"model": name, "exporter": exporter, "size": size}
    try:
        with quiet():
            graph = export(model, size, exporter)
    except Exception as error:
        return row | {"status": "not exported", "why": f"{type(error).__name__}: {str(error)[:200]}"}
    images = np.random.default_rng(0).standard_normal((3, 3, size, size), dtype=np.float32)
    try:
        started = time.perf_counter()
        bridge = to_torch(graph)
        row["import_s"] = round(time.perf_counter() - started, 2)
        with torch.no_grad():
            found = bridge.module(torch.from_numpy(images)).numpy()
    except DeployCNNError as error:
        return row | {"status": "refused", "why": str(error)}
    (expected,) = evaluator(graph, threads=2)(images)
    apart = float((np.abs(found - expected).max(1) / np.maximum(np.abs(expected).max(1), 1e-12)).max())
    bits = dict.fromkeys(["same_bytes"], bridge.write_back() == graph)
    leaves = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in bridge.module.modules())
    status = "ok" if apart < 1e-3 and bits["same_bytes"] else "DIFFERS"
    return row | {"status": status, "relative_error": apart, "layers": leaves, **bits}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", help='names; timm\'s begin with "timm/"')
    parser.add_argument("--exporters", nargs="*", default=["dynamo", "script"])
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(2)
    names = options.models or [*torchvision_names(), *(f"timm/{name}" for name in TIMM)]
    rows = []
    for name in names:
        for exporter in options.exporters:
            try:
                row = try_model(name, exporter)
            except Exception as error:
                row = {
                    "model": name,
                    "exporter": exporter,
                    "status": "BUG",
                    "why": f"{type(error).__name__}: {error}",
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1) + "\n")
    counts: dict[str, int] = {}
    for row in rows:
        counts[str(row["status"])] = counts.get(str(row["status"]), 0) + 1
    print(counts)


if __name__ == "__main__":
    main()
