from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploycnn.errors import RuntimeUnavailable, TrainingError
from deploycnn.training import checkpoint, loop, precision
from deploycnn.training.evaluate import Score, evaluate
from deploycnn.training.history import History
from deploycnn.training.losses import CrossEntropy, Loss
from deploycnn.training.settings import TrainingSettings
from deploycnn.training.view import View
from tests.training.support import make_context, make_data, make_model, same_bits, settings

DATA = make_data()


def train(folder: Path, options: TrainingSettings, **context: object) -> tuple[nn.Module, History]:
    model = make_model()
    ctx = make_context(folder, DATA, **context)  # type: ignore[arg-type]
    return model, loop.fit(model, DATA, options, loss=CrossEntropy(), ctx=ctx)


class Stop(Exception):  # noqa: N818 - not an error
    """The user's Ctrl-C."""


def stop_after(reports: int) -> object:
    left = [reports]

    def progress(done: float, total: float, message: str = "") -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return progress


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adamw", 0.01)])
def test_it_learns_and_keeps_the_best_epoch(tmp_path: Path, optimizer: str, lr: float) -> None:
    model, history = train(tmp_path, settings(epochs=8, optimizer=optimizer, lr=lr))
    assert history.kept_val_top1 > 0.9 > history.initial_val_top1
    score = evaluate(model, DATA.dataset.val, DATA.preprocessing, batch_size=7, device="cpu")
    assert score.top1 == pytest.approx(history.kept_val_top1)
    best = max(history.epochs, key=lambda epoch: (epoch.val_top1, -epoch.val_loss))
    assert history.kept_epoch == best.epoch
    assert not model.training
    assert model[0].weight.is_contiguous()  # type: ignore[index, operator]


def test_history_tells_each_epoch(tmp_path: Path) -> None:
    _, history = train(tmp_path, settings(epochs=3, lr=0.05, warmup_epochs=1))
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3]
    # 49 images in batches of 16: the single image left over is no step.
    assert history.epochs[0].lr == pytest.approx(0.05)
    assert history.epochs[2].lr == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 5 / 6)))
    assert all(epoch.seconds > 0 and 0 <= epoch.train_top1 <= 1 for epoch in history.epochs)
    assert history.epochs[2].loss < history.epochs[0].loss
    assert (history.stopped, history.precision, history.device) == ("finished", "fp32", "cpu")
    told = history.to_json()
    assert told["epochs"][0]["val_top1"] == history.epochs[0].val_top1
    assert told["kept_epoch"] == history.kept_epoch


def test_no_epochs_leave_the_weights_as_they_are(tmp_path: Path) -> None:
    model, history = train(tmp_path, settings(epochs=0))
    assert same_bits(model, make_model())
    assert (history.epochs, history.kept_epoch, history.stopped) == ((), 0, "finished")
    assert history.kept_val_top1 == history.initial_val_top1


def test_no_epochs_can_still_reestimate_batch_norms(tmp_path: Path) -> None:
    model, _ = train(tmp_path, settings(epochs=0, reestimate_bn=True))
    fresh = make_model()
    assert torch.equal(model[0].weight, fresh[0].weight)  # type: ignore[index]
    assert not torch.equal(model[1].running_mean, fresh[1].running_mean)  # type: ignore[index]


def test_gradients_are_clipped(tmp_path: Path) -> None:
    model, _ = train(tmp_path, settings(epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, max_grad_norm=1e-6))
    moved = [
        (after - before).norm()
        for after, before in zip(model.parameters(), make_model().parameters(), strict=True)
    ]
    assert 0 < max(moved) <= 4e-6  # three steps of at most 1e-6, and rounding


def test_the_learning_rate_that_each_step_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, closure: None = None) -> None:
        seen.extend({group["lr"] for group in self.param_groups})
        original(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    train(tmp_path, settings(epochs=2, lr=0.1, warmup_epochs=0))
    assert seen == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


# -- stopping ------------------------------------------------------------------------------------


def scores(monkeypatch: pytest.MonkeyPatch, values: list[tuple[float, float]]) -> None:
    """Let validation give these (top1, loss) one after the other, the initial score first."""
    left = iter(values)
    monkeypatch.setattr(
        loop, "evaluate", lambda *_, **__: Score(**dict(zip(("top1", "loss"), next(left), strict=True)))
    )


def test_early_stopping_restores_the_best_epoch_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, [(0.9, 1), (0.3, 1), (0.6, 1), (0.6, 0.9), (0.6, 0.95), (0.5, 0.1)])
    model, history = train(tmp_path, settings(epochs=10, early_stopping_patience=2))
    assert (history.kept_epoch, len(history.epochs), history.stopped) == (3, 5, "early_stopping")
    monkeypatch.undo()

    scores(monkeypatch, [(0.9, 1), (0.3, 1), (0.6, 1), (0.6, 0.9)])
    ctx = make_context(tmp_path / "other", DATA, progress=stop_after(3))  # type: ignore[arg-type]
    # The same schedule, stopped by hand at the end of epoch 3.
    monkeypatch.setattr(loop, "REPORT_INTERVAL_S", math.inf)
    third = make_model()
    with pytest.raises(StopIteration):
        loop.fit(third, DATA, settings(epochs=10, early_stopping_patience=2), loss=CrossEntropy(), ctx=ctx)
    state = torch.load(ctx.scratch / checkpoint.FILE, weights_only=True)
    ours = model.state_dict()
    assert len(state["progress"]["epochs"]) == 3
    assert all(torch.equal(ours[name], value) for name, value in state["model"].items())


def test_the_last_epoch_is_kept_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(monkeypatch, [(0.1, 1), (0.9, 1), (0.5, 1), (0.2, 1)])
    model, history = train(tmp_path, settings(epochs=3, keep="last"))
    assert (history.kept_epoch, history.kept_val_top1) == (3, 0.2)
    state = torch.load(tmp_path / "scratch" / checkpoint.FILE, weights_only=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state["model"].items())


def test_only_train_and_val_are_read(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="test split"):
        len(DATA.dataset.test)
    _, history = train(tmp_path, settings(epochs=1, reestimate_bn=True))
    assert len(history.epochs) == 1


# -- determinism and resuming --------------------------------------------------------------------

OPTIONS = settings(epochs=4, lr=0.05, schedule="one_cycle", early_stopping_patience=3, reestimate_bn=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return train(tmp_path_factory.mktemp("uninterrupted"), OPTIONS)[0]


def test_same_seed_same_bits(tmp_path: Path, uninterrupted: nn.Module) -> None:
    torch.manual_seed(12345)  # what the process did before does not matter
    assert same_bits(train(tmp_path, OPTIONS)[0], uninterrupted)


def test_another_seed_gives_other_weights(tmp_path: Path, uninterrupted: nn.Module) -> None:
    assert not same_bits(train(tmp_path, OPTIONS, seed=1)[0], uninterrupted)


@given(
    stops=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    adamw=st.booleans(),
    averaged=st.booleans(),
    mixed=st.booleans(),
)
@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_interrupted_anywhere_and_continued_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    stops: list[int],
    adamw: bool,
    averaged: bool,
    mixed: bool,
) -> None:
    monkeypatch.setattr(loop, "REPORT_INTERVAL_S", 0)  # a report, so a possible stop, at every step
    options = settings(
        epochs=3,
        lr=0.01,
        optimizer="adamw" if adamw else "sgd",
        reestimate_bn=True,
        ema=0.9 if averaged else None,
        mixup=0.4 if mixed else 0.0,
        cutmix=1.0 if mixed else 0.0,
    )
    whole = train(tmp_path_factory.mktemp("whole"), options)[0]
    folder = tmp_path_factory.mktemp("parts")
    for reports in stops:
        try:
            train(folder, options, progress=stop_after(reports))
        except Stop:
            continue
    continued, history = train(folder, options)
    assert same_bits(continued, whole)
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3]


def test_a_finished_training_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, history = train(tmp_path, OPTIONS)
    monkeypatch.setattr(torch.optim.SGD, "step", None)
    again, history_again = train(tmp_path, OPTIONS)
    assert same_bits(first, again)
    assert history == history_again


def test_a_checkpoint_of_other_weights_is_not_continued(tmp_path: Path) -> None:
    """One pass may train several times in its folder, as the ladder of int8 does with what it chose by then."""
    train(tmp_path, settings(epochs=2))
    other, alone = make_model(seed=1), make_model(seed=1)
    loop.fit(other, DATA, settings(epochs=2), loss=CrossEntropy(), ctx=make_context(tmp_path, DATA))
    loop.fit(alone, DATA, settings(epochs=2), loss=CrossEntropy(), ctx=make_context(tmp_path / "alone", DATA))
    assert same_bits(other, alone)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    history = loop.fit(
        narrow, DATA, settings(epochs=2), loss=CrossEntropy(), ctx=make_context(tmp_path, DATA)
    )
    assert len(history.epochs) == 2


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    train(tmp_path, settings(epochs=1, lr=0.2))
    other = settings(epochs=1, lr=0.01)
    assert same_bits(train(tmp_path, other)[0], train(tmp_path / "fresh", other)[0])


def test_threads_flags_and_generators_are_put_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    inside: list[tuple[int, bool]] = []

    def progress(done: float, total: float, message: str = "") -> None:
        inside.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))

    train(tmp_path, settings(epochs=1), threads=threads + 1, progress=progress)
    assert set(inside) == {(threads + 1, True)}
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), generator)


# -- divergence ----------------------------------------------------------------------------------


class Poison(Loss):
    """Cross-entropy, until it is not a number."""

    def __init__(self, at: int, value: float = math.nan) -> None:
        self.left, self.value = at, value

    def __call__(self, logits_NK: Tensor, view: View) -> Tensor:
        self.left -= 1
        loss = CrossEntropy()(logits_NK, view)
        return loss * self.value if self.left <= 0 else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_stops_names_the_step_and_keeps_the_last_good_weights(
    tmp_path: Path, value: float
) -> None:
    ctx = make_context(tmp_path, DATA)
    with pytest.raises(TrainingError) as caught:
        loop.fit(make_model(), DATA, settings(lr=0.05), loss=Poison(8, value), ctx=ctx)
    message = str(caught.value)
    assert f"loss became {value} at epoch 3, step 2 of 3" in message
    assert "lower `lr` (peak now 0.05)" in message
    assert "\n" not in message
    path = ctx.scratch / checkpoint.FILE
    assert str(path) in message
    kept = torch.load(path, weights_only=True)
    assert len(kept["progress"]["epochs"]) == 2
    assert all(torch.isfinite(value).all() for value in kept["model"].values())

    # Run again without the cause: it continues there, as if nothing had happened.
    continued, history = train(tmp_path, settings(lr=0.05))
    assert len(history.epochs) == 4
    assert same_bits(continued, train(tmp_path / "clean", settings(lr=0.05))[0])


def test_divergence_in_the_first_epoch_leaves_the_initial_weights(tmp_path: Path) -> None:
    ctx = make_context(tmp_path, DATA)
    with pytest.raises(TrainingError, match="from before the first step"):
        loop.fit(make_model(), DATA, settings(), loss=Poison(1), ctx=ctx)
    kept = torch.load(ctx.scratch / checkpoint.FILE, weights_only=True)["model"]
    assert all(torch.equal(value, kept[name]) for name, value in make_model().state_dict().items())


def test_divergence_that_shows_on_val_only_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(monkeypatch, [(0.5, 1.0), (0.6, 1.0), (0.1, math.nan)])
    with pytest.raises(TrainingError, match="validation loss became nan at epoch 2"):
        train(tmp_path, settings())


def test_a_far_too_high_rate_really_diverges(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="training diverged"):
        train(tmp_path, settings(epochs=30, lr=1e30, warmup_epochs=0))


# -- precision -----------------------------------------------------------------------------------


def test_bf16_is_used_where_the_cpu_has_it(tmp_path: Path) -> None:
    if not precision.cpu_has_bf16():
        pytest.skip("this CPU has no bf16 arithmetic")
    model, history = train(tmp_path, settings(epochs=6, lr=0.05, precision="bf16"))
    assert (history.precision, history.kept_val_top1 > 0.8) == ("bf16", True)
    assert model[0].weight.dtype == torch.float32  # type: ignore[index]
    assert not same_bits(model, train(tmp_path / "fp32", settings(epochs=6, lr=0.05))[0])


def test_bf16_without_hardware_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    with pytest.raises(RuntimeUnavailable, match="no bf16 arithmetic"):
        precision.choices("bf16", "cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, ("fp32", "bf16")), (False, ("fp32",))])
def test_fp16_on_a_cpu_is_refused_and_auto_is_what_it_may_have(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    with pytest.raises(RuntimeUnavailable, match="fp16 needs a GPU"):
        precision.choices("fp16", "cpu")
    assert precision.choices("auto", "cpu") == expected
    assert precision.choices("fp32", "cpu") == ("fp32",)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_what_it_has(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    assert precision.choices("auto", "cuda") == (expected,)
    if not native:
        with pytest.raises(RuntimeUnavailable, match="no bf16"):
            precision.choices("bf16", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu(tmp_path: Path, kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} finds no CUDA device")
    options = settings(epochs=6, lr=0.05, precision=kind)
    model, history = train(tmp_path, options, device="cuda")
    assert history.kept_val_top1 > 0.8
    assert model[0].weight.device.type == "cpu"  # type: ignore[index]
    assert same_bits(model, train(tmp_path / "again", options, device="cuda")[0])
