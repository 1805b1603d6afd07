"""From a torch artifact to a trained torch artifact: what the passes ``train`` and ``distill`` share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from deploycnn.core import Artifact, Context, Draft, Facts, Json
from deploycnn.data.base import Data
from deploycnn.data.loader import batches
from deploycnn.errors import ArtifactError, PassRequirementError
from deploycnn.models.artifact import load_model, save_model
from deploycnn.pruning import zeros
from deploycnn.tasks import classification
from deploycnn.training.determinism import deterministic
from deploycnn.training.evaluate import evaluate
from deploycnn.training.history import History
from deploycnn.training.loop import fit
from deploycnn.training.losses import Loss
from deploycnn.training.settings import TrainingSettings


def needed_data(ctx: Context, where: str) -> Data:
    """The context's data.

    Raises:
        PassRequirementError: there are none.
    """
    if ctx.data is None:
        raise PassRequirementError(f"{where}: needs images, but the recipe has no `data`")
    return ctx.data


def load_checked(path: Path, facts: Facts, data: Data, where: str) -> nn.Module:
    """Load a model that fits the data.

    Args:
        path: Of a torch artifact.
        facts: What is known of it.
        data: Images that it is to see.
        where: What it is called in messages ("train: the model").

    Raises:
        PreprocessingError: it was made for images prepared otherwise.
        PassRequirementError: it was made for other classes, or does not return one logit per class.
        ArtifactError: its files are damaged.
    """
    data.preprocessing.check_same(facts.preprocessing, where)
    classes = data.dataset.classes
    if facts.classes and facts.classes != classes:
        raise PassRequirementError(
            f"{where} tells {len(facts.classes)} classes apart ({_listing(facts.classes)}), the data have "
            f"{len(classes)} ({_listing(classes)}); choose the data that it was made for"
        )
    model = load_model(path)
    classification.check_model(model, sample(data), len(classes), where)
    return model


def stored_facts(folder: Path) -> Facts:
    """What a run directory's manifest says of the torch artifact in ``folder``; nothing where there is none.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return Facts()
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
        return Facts(preprocessing=facts["preprocessing"], classes=tuple(facts["classes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged ({error}); make the artifact again") from error


def val_top1(model: nn.Module, data: Data, batch_size: int, ctx: Context) -> float:
    """Top-1 of a model on ``ctx.device``, on val, in [0, 1]."""
    with deterministic(threads=ctx.threads, device=ctx.device):
        return evaluate(
            model, data.dataset.val, data.preprocessing, batch_size=batch_size, device=ctx.device
        ).top1


def _listing(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def sample(data: Data, count: int = 1) -> Tensor:
    """Real images, so that checks need no assumption about shapes: ``count`` or all of val."""
    batch = next(iter(batches(data.dataset.val, data.preprocessing, count, limit=count)))
    return torch.from_numpy(batch.images)


def train(
    source: Artifact,
    settings: TrainingSettings,
    ctx: Context,
    *,
    loss: Loss | Callable[[nn.Module], Loss],
    where: str,
    record: Mapping[str, Json] | None = None,
    spent_s: float = 0.0,
) -> Draft:
    """Train ``source`` on the context's data and write it to ``ctx.output``.

    Args:
        source: A torch artifact.
        settings: How to train.
        ctx: With data.
        loss: What to minimize; or a function that makes it for the model, which it may look into.
        where: The pass's name, for messages.
        record: What else is to be known of the result, beside the history under "training".
        spent_s: As in ``fit``.

    Raises:
        PreprocessingError, PassRequirementError, ArtifactError: see :func:`load_checked`.
        TrainingError, RuntimeUnavailable, StorageError: see :func:`deploycnn.training.loop.fit`.
    """
    data = needed_data(ctx, where)
    model = load_checked(source.path, source.facts, data, f"{where}: the model")
    # Weights that a pass set to zero on purpose stay zero.
    zeros.keep_zeros(model, zeros.meant(ctx.lineage))
    if not isinstance(loss, Loss):
        loss = loss(model)
    history = fit(model, data, settings, loss=loss, ctx=ctx, spent_s=spent_s)
    return trained_draft(source, model, history, ctx, record)


def trained_draft(
    source: Artifact,
    model: nn.Module,
    history: History,
    ctx: Context,
    record: Mapping[str, Json] | None = None,
) -> Draft:
    """Write ``model``, which was trained from ``source`` on the context's data, and describe it.

    ``record`` is what is to be known of it beside the history, which stands under "training".
    """
    data = needed_data(ctx, "training")
    if history.kept_val_top1 < history.initial_val_top1:
        ctx.log.warning(
            "training made val top-1 worse: %.4f before, %.4f kept; lower lr, or train for more epochs",
            history.initial_val_top1,
            history.kept_val_top1,
        )
    save_model(model, ctx.output)
    facts = dataclasses.replace(
        source.facts,
        preprocessing=data.preprocessing.to_json(),
        classes=data.dataset.classes,
        record={"training": history.to_json(), **(record or {})},
    )
    return Draft(format="torch", inputs=source.inputs, outputs=source.outputs, facts=facts)
