"""What `benchmarks/gpu.py` measures: nets, precisions, forms and runtimes, as data, and the recipe of a net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploycnn.errors import RecipeError, nearest


@dataclass(frozen=True, kw_only=True)
class Net:
    """A net, where it comes from, and the side of its images in pixels."""

    name: str
    kind: str
    size: int


NETS = {
    net.name: net
    for net in (
        Net(name="resnet50", kind="torchvision", size=224),
        Net(name="resnet20", kind="zoo", size=32),
        Net(name="resnet56", kind="zoo", size=32),
    )
}
PRECISIONS = ("fp32", "tf32", "fp16", "int8", "int8_fp16")

# The plain INT8 graph is what is compared, so nothing is left in float for being slow in another runtime.
_INT8 = {"int8": {"do_no_harm": False, "rules": "tensorrt", "calibration_images": 256}}
#: Random weights make logits so even that halves move them far; parity is told apart from this.
_HALF = {"fp16": {"relative_tolerance": 1.0}}
#: Passes from the exported graph to the precision's graph.
_GRAPHS: dict[str, list[Any]] = {
    "fp32": [],
    "tf32": [],
    "fp16": [_HALF],
    "int8": [_INT8],
    "int8_fp16": [_INT8, _HALF],
}

#: Form of a variant -> runtimes that open it, without their options.
ENGINES = {"trt": ("tensorrt", "tensorrt:trt"), "rtx": ("tensorrt-rtx", "tensorrt:rtx")}
_ONNX = ("onnxruntime:cuda", "onnxruntime:tensorrt", "onnxruntime:tensorrt-rtx")
#: How a row is timed: with copies, without, and without as a CUDA graph.
_TIMED = ("", "+device", "+graph+device")
#: PyTorch's modes with how they are timed (compiled code launches its kernels itself), and its options for a
#: precision; it has no INT8 on GPUs to compare with.
_TORCH_MODES = (("eager-cuda", _TIMED), ("compiled-cuda", _TIMED[:2]))
_TORCH = {"fp32": "+fp32", "tf32": "", "fp16": "+fp16+channels-last"}


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A row that is expected in the table."""

    net: str
    variant: str
    precision: str
    runtime: str
    batch_size: int

    @property
    def transfers(self) -> bool:
        """Whether copies to and from the device are in the time."""
        return "device" not in self.runtime.split("+")


def net(name: str) -> Net:
    """The net called ``name``.

    Raises:
        RecipeError: there is none.
    """
    if name not in NETS:
        raise RecipeError(f'--nets: no net "{name}"; {nearest(name, NETS)}')
    return NETS[name]


def checked(precisions: Sequence[str]) -> tuple[str, ...]:
    """The precisions, in the table's order.

    Raises:
        RecipeError: one is unknown, or there is none.
    """
    for name in precisions:
        if name not in PRECISIONS:
            raise RecipeError(f'--precisions: no precision "{name}"; {nearest(name, PRECISIONS)}')
    if not precisions:
        raise RecipeError(f"--precisions: name at least one of {', '.join(PRECISIONS)}")
    return tuple(name for name in PRECISIONS if name in precisions)


def variants(
    net: Net, precisions: Sequence[str], *, trained: bool = True, largest: int = 256, best: int = 8
) -> dict[str, list[Any]]:
    """Chains of passes by the variant's name; `torch` comes first and is what ratios are taken against.

    Engines take batches up to ``largest`` and are optimized for ``best``.
    """
    # A few epochs make logits that depend on the image; where weights were given they stay.
    head: list[Any] = (
        [{"train": {"skip_trained": True, "epochs": 3}}] if net.kind == "zoo" and not trained else []
    )
    chains: dict[str, list[Any]] = {"torch": head}
    for precision in precisions:
        graph = [*head, "export", *_GRAPHS[precision]]
        if precision != "tf32":
            chains[f"onnx-{precision}"] = graph
        for form, (flavour, _) in ENGINES.items():
            build = {"flavour": flavour, "max_batch": largest, "opt_batch": best, "tf32": precision == "tf32"}
            chains[f"{form}-{precision}"] = [*graph, {"build_engine": build}]
    return chains


def recipe(
    net: Net,
    precisions: Sequence[str],
    *,
    batch_sizes: Sequence[int],
    budget_s: float,
    accuracy: bool,
    trained: bool,
    runtimes: Sequence[str],
    best: int = 8,
) -> dict[str, Any]:
    """The recipe of a net; ``runtimes`` begins with one that works here."""
    largest = max(batch_sizes)
    return {
        "name": f"gpu-{net.name}",
        "source": {net.kind: net.name},
        "data": "digits",
        "preprocessing": {"size": net.size},
        "target": "tensorrt",
        "variants": variants(net, precisions, trained=trained, largest=largest, best=min(best, largest)),
        "profile": {
            "runtimes": list(runtimes),
            "batch_sizes": list(batch_sizes),
            "threads": [1],
            "budget_s": budget_s,
            "accuracy": accuracy,
            "memory": False,
        },
    }


def runtimes_of(variant: str, precisions: Sequence[str]) -> list[tuple[str, str]]:
    """(precision, runtime) of the rows that a variant gives.

    The PyTorch model is one file whose options choose the precision. ONNX Runtime's FP32 row is FP32 by the CUDA
    provider; TensorRT's providers may round it to TF32, and say so in the column of what ran.
    """
    form, _, precision = variant.partition("-")
    if form == "torch":
        chosen = [(name, option) for name, option in _TORCH.items() if name in precisions]
        return [
            (name, f"pytorch:{mode}{timed}{option}")
            for name, option in chosen
            for mode, ways in _TORCH_MODES
            for timed in ways
        ]
    opened = _ONNX if form == "onnx" else (ENGINES[form][1],)
    return [(precision, f"{runtime}{timed}") for runtime in opened for timed in _TIMED]


def specs(precisions: Sequence[str]) -> tuple[str, ...]:
    """Every runtime that the plan names, once, in the table's order."""
    names = variants(NETS["resnet50"], precisions)
    return tuple(dict.fromkeys(runtime for name in names for _, runtime in runtimes_of(name, precisions)))


def combinations(net: Net, precisions: Sequence[str], batch_sizes: Sequence[int]) -> list[Combination]:
    """Every row that a full table of this net has."""
    return [
        Combination(
            net=net.name, variant=variant, precision=precision, runtime=runtime, batch_size=batch_size
        )
        for batch_size in batch_sizes
        for variant in variants(net, precisions)
        for precision, runtime in runtimes_of(variant, precisions)
    ]


def text(rows: Sequence[Combination]) -> str:
    """The plan, a line for each row."""
    lines = [
        f"{row.net:9} batch {row.batch_size:<4} {row.precision:10} {row.variant:16} {row.runtime}"
        for row in rows
    ]
    return "\n".join([*lines, f"{len(rows)} rows"])
