"""Classify image files with the model beside this script.

    python predict.py image.jpg [more images]

Needs numpy, Pillow and onnxruntime (or openvino). The preprocessing is the one that the model was trained,
calibrated and measured with; it is read from deploy.json. Exit code 2: an image or the model cannot be used, told
in one line each; the other images are classified all the same.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FILTERS = {"bilinear": "BILINEAR", "bicubic": "BICUBIC", "nearest": "NEAREST", "area": "BOX"}


def prepare(picture: Image.Image, spec: Mapping[str, Any]) -> np.ndarray:
    """A PIL image as float32 input of shape (1, C, H, W)."""
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    if spec["channels"] == "gray":
        picture = picture.convert("L")
    pixels = np.asarray(fit(picture, spec), dtype=np.uint8)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if spec["channels"] == "bgr":
        pixels = pixels[:, :, ::-1]
    unit = pixels.astype(np.float64) / 255
    if spec["scale"] == "signed":
        unit = 2 * unit - 1
    elif spec["scale"] == "standardize":
        unit = (unit - np.array(spec["mean"])) / np.array(spec["std"])
    return unit.astype(np.float32).transpose(2, 0, 1)[None]


def fit(picture: Image.Image, spec: Mapping[str, Any]) -> Image.Image:
    """Bring an image to the declared size: squash, letterbox or center_crop."""
    height, width = spec["size"]
    filter_ = getattr(Image.Resampling, FILTERS[spec["interpolation"]])
    if picture.size == (width, height) and spec["crop_ratio"] == 1:
        return picture
    if spec["resize"] == "squash":
        return picture.resize((width, height), filter_)
    if spec["resize"] == "letterbox":
        factor = min(height / picture.height, width / picture.width)
        new_h = min(height, max(1, round(picture.height * factor)))
        new_w = min(width, max(1, round(picture.width * factor)))
        pad = spec["pad_value"] if spec["channels"] == "gray" else (spec["pad_value"],) * 3
        canvas = Image.new(picture.mode, (width, height), pad)
        canvas.paste(picture.resize((new_w, new_h), filter_), ((width - new_w) // 2, (height - new_h) // 2))
        return canvas
    cover_h, cover_w = (math.floor(side / spec["crop_ratio"]) for side in (height, width))
    if picture.height * cover_w <= picture.width * cover_h:
        new_h, new_w = cover_h, max(cover_w, cover_h * picture.width // picture.height)
    else:
        new_h, new_w = max(cover_h, cover_w * picture.height // picture.width), cover_w
    top, left = round((new_h - height) / 2), round((new_w - width) / 2)
    return picture.resize((new_w, new_h), filter_).crop((left, top, left + width, top + height))


def load(folder: Path, runtime: str) -> Callable[[np.ndarray], np.ndarray]:
    """The model as a function from input to logits."""
    path = str(folder / "model.onnx")
    if runtime.startswith("openvino"):
        import openvino

        hint = "bf16" if runtime.endswith(":bf16") else "f32"
        model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        return lambda images: model(images)[0]
    import onnxruntime

    provider = "CUDAExecutionProvider" if runtime.endswith(":cuda") else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(path, providers=[provider])
    if session.get_providers()[0] != provider:
        raise ImportError(f"{provider} did not load")
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def opened(path: str) -> Image.Image:
    """The image in a file, decoded whole, so that a truncated one is found here.

    Raises:
        ValueError: it is missing or no image; says which.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as an image: {reason}") from error


def fail(message: str) -> int:
    """Tell what is wrong in one line; the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(paths: Sequence[str]) -> int:
    """Print the class and its probability for each image; the exit code."""
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(__file__).resolve().parent
    try:
        deploy = json.loads((folder / "deploy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return fail(f"{folder / 'deploy.json'}: cannot be read ({error}); copy the whole folder")
    if deploy["preprocessing"] is None:
        return fail("deploy.json does not say how images are prepared for this model")
    missing = [name for name in deploy["files"] if not (folder / name).is_file()]
    if missing:
        return fail(f"{folder / missing[0]}: missing; copy the whole folder")
    try:
        model = load(folder, deploy["runtime"] or "onnxruntime")
    except ImportError as error:
        return fail(f"{error}; install it, this model was measured on {deploy['runtime'] or 'onnxruntime'}")
    worst = 0
    for path in paths:
        try:
            picture = opened(path)
        except ValueError as error:
            worst = fail(str(error))
            continue
        logits = model(prepare(picture, deploy["preprocessing"]))[0]
        odds = np.exp(logits - logits.max())
        best = int(odds.argmax())
        name = deploy["classes"][best] if deploy["classes"] else best
        print(f"{path}\t{name}\t{odds[best] / odds.sum():.3f}")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
