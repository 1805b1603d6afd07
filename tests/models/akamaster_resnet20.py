"""State-dict keys of the published CIFAR ResNet-20 checkpoint without ``module.``, as in the file itself."""

PARTS = ("weight", "bias", "running_mean", "running_var")

KEYS = frozenset(
    {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{part}" for part in PARTS)}
    | {
        f"layer{stage}.{block}.{conv}.weight"
        for stage in (1, 2, 3)
        for block in (0, 1, 2)
        for conv in ("conv1", "conv2")
    }
    | {
        f"layer{stage}.{block}.{norm}.{part}"
        for stage in (1, 2, 3)
        for block in (0, 1, 2)
        for norm in ("bn1", "bn2")
        for part in PARTS
    }
)
