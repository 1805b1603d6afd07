"""How much accuracy comes back after pruning, for 1, 5 and 20 epochs: ``distill`` against plain fine-tuning.

    python benchmarks/recovery.py --data cifar10-jpeg.zip --net resnet56 --weights resnet56.safetensors \
        --epochs 1 5 20 --macs-ratio 0.5 --work runs/recovery --out recovery.jsonl

One pruned model is recovered in both ways on the same images. Plain is what Torch-Pruning's CIFAR scripts do by
default: SGD at 0.01 with momentum 0.9, weight decay 5e-4 on all parameters, batches of 128, crops padded with 4 zeros
and flips, the rate divided by 10 after 60% and 80% of the epochs; batch norms start with what pruning left. Ours is
``distill: {teacher: self}`` with defaults, or with what ``--set`` says. Both keep their best epoch on val (the last
500 images of each training class); the test split compares what was kept, once for each seed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it
import yaml
from training_runs import Bench, add_arguments, summary

from deploycnn import schema
from deploycnn.core import Artifact
from deploycnn.models.artifact import load_model, save_model
from deploycnn.passes.distill import Distill
from deploycnn.passes.prune import Prune
from deploycnn.sources.zoo import Zoo
from deploycnn.training import feed
from deploycnn.training.determinism import deterministic, seed_everything
from deploycnn.training.device import model_home, model_to
from deploycnn.training.evaluate import Score, evaluate
from deploycnn.training.settings import TrainingSettings

AUGMENT = {"crop_padding": 4, "padding": "zero", "horizontal_flip": True}


def plain(bench: Bench, name: str, source: Artifact, epochs: int, seed: int) -> tuple[Artifact, Score]:
    """Fine-tune as Torch-Pruning's scripts do; the best epoch on val is kept."""
    settings = schema.build(TrainingSettings, {"batch_size": 128, "augment": AUGMENT}, "plain")
    device, data = bench.given.device, bench.data
    output = bench.folder / name
    output.mkdir(parents=True, exist_ok=True)
    best: Score | None = None
    with deterministic(threads=bench.given.threads, device=device):
        model = model_to(load_model(source.path), device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        milestones = [round(share * epochs) for share in (0.6, 0.8)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        for epoch in range(1, epochs + 1):
            seed_everything(seed, epoch)
            model.train()
            for view in feed.train_views(data, settings, seed=seed, epoch=epoch, device=device):
                if len(view.labels) < settings.batch_size:
                    continue
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(view.images), view.labels))
                optimizer.step()
            scheduler.step()
            score = evaluate(model, data.dataset.val, data.preprocessing, batch_size=256, device=device)
            if best is None or score.better_than(best):
                best = score
                state = {key: value.to("cpu", copy=True) for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        save_model(model_home(model), output)
    assert best is not None
    made = Artifact(
        key=name,
        format="torch",
        path=output / "model.safetensors",
        inputs=source.inputs,
        outputs=source.outputs,
        parents=(),
        facts=source.facts,
    )
    return made, best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--net", default="resnet56")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--macs-ratio", type=float, default=0.5)
    parser.add_argument("--importance", default="taylor")
    parser.add_argument(
        "--pruned", type=Path, help="instead of pruning: folder of an artifact that was pruned from --weights"
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME:{OPTIONS}",
        help="a way of recovering, options of distill in YAML; repeatable. Default: `ours:{}`",
    )  # fmt: skip
    parser.add_argument("--no-plain", action="store_true", help="only ours, to choose among options on val")
    parser.add_argument("--no-test", action="store_true", help="leave the test split alone (while choosing)")
    given = parser.parse_args()
    ways = {
        text.partition(":")[0]: yaml.safe_load(text.partition(":")[2]) for text in given.set or ["ours:{}"]
    }
    bench = Bench(given)
    dense = bench.make("dense", Zoo(name=given.net, weights=given.weights))
    if given.pruned is not None:
        pruned = opened(given.pruned, dense)
    else:
        prune = Prune(macs_ratio=given.macs_ratio, importance=given.importance, scope="global")
        pruned = bench.make("pruned", prune, dense, lineage=(dense,))
    val = bench.data.dataset.val
    bench.tell(
        net=given.net,
        macs_ratio=macs(pruned) / macs(dense),
        train_images=len(bench.data.dataset.train),
    )
    bench.tell(way="dense", val_top1=bench.top1(dense, val))
    bench.tell(way="pruned", val_top1=bench.top1(pruned, val))
    for epochs in given.epochs:
        test: dict[str, list[float]] = {}
        for seed in range(given.seeds):
            for name in (*ways, *([] if given.no_plain else ["plain"])):
                made, score, seconds = recover(bench, name, ways, pruned, dense, epochs, seed)
                row = {"way": name, "epochs": epochs, "seed": seed, "seconds": seconds}
                row |= {"val_top1": score.top1, "val_loss": round(score.loss, 4)}
                if not given.no_test:
                    row["test_top1"] = bench.top1(made, bench.test)
                    test.setdefault(name, []).append(row["test_top1"])
                bench.tell(**row)
        for name in ways if "plain" in test else ():
            gains = [ours - theirs for ours, theirs in zip(test[name], test["plain"], strict=True)]
            bench.tell(way=name, epochs=epochs, test_images=len(bench.test), gain=summary(gains))


def macs(made: Artifact) -> int:
    """Of one image."""
    assert made.facts.macs is not None, f"{made.key}: its source counted no MACs"
    return made.facts.macs


def opened(folder: Path, dense: Artifact) -> Artifact:
    """A pruned model of a run directory."""
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    return replace(
        dense,
        key="pruned",
        path=folder / "model.safetensors",
        facts=replace(dense.facts, macs=facts["macs"], params=facts["params"], record=facts["record"]),
    )


def recover(
    bench: Bench,
    name: str,
    ways: dict[str, dict[str, Any]],
    pruned: Artifact,
    dense: Artifact,
    epochs: int,
    seed: int,
) -> tuple[Artifact, Score, float | None]:
    """What a way makes of the pruned model, its score on val, and its seconds where they are known."""
    key = f"{name}-{epochs}-{seed}"
    if name not in ways:
        made, score = plain(bench, key, pruned, epochs, seed)
        return made, score, None
    options = {"teacher": "self", "epochs": epochs, "augment": AUGMENT, **ways[name]}
    step = schema.build(Distill, options, name)
    made = bench.make(key, step, pruned, seed=seed, lineage=(dense, pruned))
    history = made.facts.record["training"]
    kept = history["epochs"][history["kept_epoch"] - 1]
    score = Score(top1=kept["val_top1"], loss=kept["val_loss"])
    return made, score, round(sum(epoch["seconds"] for epoch in history["epochs"]), 1)


if __name__ == "__main__":
    main()
