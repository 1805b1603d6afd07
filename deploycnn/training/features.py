"""What a teacher knows inside: feature maps of a student compared with those of its teacher.

Legend: N images, C channels, H and W the map's size; ``s`` student, ``t`` teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it
from torch import Tensor, nn

from deploycnn.errors import PassRequirementError

FeatureMethod = Literal["at", "fitnet"]
Pair = tuple[str, str]


def attention(maps_NCHW: Tensor) -> Tensor:
    """Mean of squared activations over channels, as vectors of length 1: shape (N, H * W).

    Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", section 3.1 (F_sum with p = 2; the mean is
    the same once normalized).
    """
    return F.normalize(maps_NCHW.float().pow(2).mean(dim=1).flatten(1), dim=1)


def at(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean squared difference of attention maps, over images and places.

    Equation 2 of that paper with the squared norm and means instead of sums, as its authors' code has it, where the
    weight of the sum over layers is 1000.
    """
    return F.mse_loss(attention(student_NCHW), attention(teacher_NCHW))


def fitnet(regressed_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean squared difference of the regressed student's maps from the teacher's.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3, averaged over all elements instead of
    halved and summed.
    """
    return F.mse_loss(regressed_NCHW.float(), teacher_NCHW.float())


def stages(model: nn.Module, images_NCHW: Tensor) -> dict[tuple[int, int], str]:
    """The last module to put out maps of each size, by a forward pass in evaluation mode.

    Modules that run more than once are passed over, as their output would not be one thing, and so are maps of a
    single pixel. Where a block ends with its last layer, the block is meant: its output is the same.

    Returns:
        Name by (height, width), in the order in which they ran.
    """
    found: dict[tuple[int, int], str] = {}
    shapes = _shapes(model, images_NCHW)
    for name, shape in shapes:
        if len(shape) == 4 and shape[2] * shape[3] > 1 and sum(name == other for other, _ in shapes) == 1:
            size = (shape[2], shape[3])
            found.pop(size, None)
            found[size] = name
    return found


def _shapes(model: nn.Module, images_NCHW: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """(module, shape of its output) in the order in which modules finished."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            seen.append((name, tuple(output.shape) if isinstance(output, Tensor) else ()))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model.eval()(images_NCHW)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def find_pairs(
    student: nn.Module, teacher: nn.Module, images_NCHW: Tensor, layers: Sequence[str], where: str
) -> list[Pair]:
    """Layers to compare, as (student's, teacher's).

    Args:
        student: In evaluation mode.
        teacher: Likewise.
        images_NCHW: At least one image.
        layers: Names, "NAME" where both have it, else "STUDENT=TEACHER"; empty: the last of each resolution that
            both have.
        where: Who asks, for messages.

    Raises:
        PassRequirementError: a layer is missing or puts out no maps, or nothing fits.
    """
    if not layers:
        ours, theirs = stages(student, images_NCHW), stages(teacher, images_NCHW)
        common = [(ours[size], theirs[size]) for size in ours if size in theirs]
        if not common:
            raise PassRequirementError(
                f"{where}: student and teacher have no feature maps of one size (student {_sizes(ours)}, teacher "
                f"{_sizes(theirs)}); name pairs in `feature_layers`, as STUDENT=TEACHER"
            )
        return common
    pairs = []
    for entry in layers:
        first, _, second = entry.partition("=")
        pairs.append((first.strip(), (second or first).strip()))
    for role, model, names in (("student", student, 0), ("teacher", teacher, 1)):
        shapes = _shapes(model, images_NCHW)
        maps = [name for name, shape in shapes if len(shape) == 4]
        for pair in pairs:
            name = pair[names]
            if maps.count(name) != 1:
                known = ", ".join(list(stages(model, images_NCHW).values())[:4])
                why = "runs more than once" if name in maps else "puts out no feature maps"
                raise PassRequirementError(
                    f"{where}: feature_layers: {name!r} of the {role} {why}; layers that do are {known}"
                )
    return pairs


def _sizes(found: dict[tuple[int, int], str]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in found) or "none"


class Features:
    """Compares the maps that a student and a teacher put out in their latest forward passes.

    Maps of different size are averaged down to the smaller one. For "fitnet" each pair has a 1x1 convolution that
    brings the student's channels to the teacher's; it is trained with the student and belongs to neither.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[Pair],
        method: FeatureMethod,
        images_NCHW: Tensor,
        *,
        seed: int,
    ) -> None:
        """Hook into both models; :meth:`close` takes the hooks out again."""
        self.method = method
        self.regressors = nn.ModuleList()
        self.pairs = list(pairs)
        self._student: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] = {}
        if method == "fitnet":
            ours, theirs = (dict(_shapes(model, images_NCHW)) for model in (student, teacher))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for first, second in pairs:
                    self.regressors.append(nn.Conv2d(ours[first][1], theirs[second][1], 1))
        self._handles = [
            *self._listen(student, {first for first, _ in pairs}, self._student, training_only=True),
            *self._listen(teacher, {second for _, second in pairs}, self._teacher, training_only=False),
        ]

    @staticmethod
    def _listen(
        model: nn.Module, names: set[str], kept: dict[str, Tensor], *, training_only: bool
    ) -> list[torch.utils.hooks.RemovableHandle]:
        def listener(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                if torch.is_grad_enabled() or not training_only:
                    kept[name] = output

            return hook

        return [model.get_submodule(name).register_forward_hook(listener(name)) for name in sorted(names)]

    def close(self) -> None:
        """Leave both models as they were."""
        for handle in self._handles:
            handle.remove()

    def term(self) -> Tensor:
        """Sum over pairs, a scalar."""
        total = torch.zeros(())
        for index, (first, second) in enumerate(self.pairs):
            student, teacher = self._student[first], self._teacher[second].detach()
            size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
            student, teacher = _shrink(student, size), _shrink(teacher, size)
            if self.method == "fitnet":
                student = self.regressors[index](student)
            loss = fitnet(student, teacher) if self.method == "fitnet" else at(student, teacher)
            total = total.to(loss.device) + loss
        self._student.clear()
        self._teacher.clear()
        return total


def _shrink(maps_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return maps_NCHW if tuple(maps_NCHW.shape[2:]) == size else F.adaptive_avg_pool2d(maps_NCHW, size)
