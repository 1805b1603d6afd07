"""Quantize with NNCF, in its own environment.

    python nncf_quantize.py FLOAT.onnx IMAGES.npy OUT.xml [PRESET]

IMAGES.npy holds preprocessed images (N, C, H, W). PRESET is "performance" (its default) or "mixed".
"""

import sys

import nncf
import numpy as np
import openvino


def main() -> None:
    source, images_path, target = sys.argv[1:4]
    preset = nncf.QuantizationPreset(sys.argv[4] if len(sys.argv) > 4 else "performance")
    images = np.load(images_path)
    model = openvino.Core().read_model(source)
    dataset = nncf.Dataset([image[None] for image in images])
    quantized = nncf.quantize(model, dataset, preset=preset, subset_size=len(images))
    openvino.save_model(quantized, target, compress_to_fp16=False)


main()
