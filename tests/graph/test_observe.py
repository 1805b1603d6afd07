"""What is shown of a graph is what onnxruntime computes, whatever the threads; values of few runs are held."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import ModelProto
from onnx.parser import parse_model

from deploycnn.errors import PassRequirementError
from deploycnn.graph import observe as module
from deploycnn.graph.model import infer_shapes
from deploycnn.graph.observe import observe

IMAGES = np.random.default_rng(0).standard_normal((70, 3, 4, 4)).astype(np.float32)


def graph(body: str) -> ModelProto:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,4,4] x) => (float[N,3,4,4] y) {' + body + "}"
    )
    return infer_shapes(parse_model(text))


TWO_VALUES = graph("a = Sigmoid(x) y = Sqrt(a)")


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_all_images_are_shown_in_order_as_onnxruntime_computes_them(threads: int) -> None:
    seen: dict[str, list[npt.NDArray[np.float32]]] = {}
    done: list[int] = []
    count = observe(
        TWO_VALUES,
        ["x", "a", "y"],
        [IMAGES[:50], IMAGES[50:]],
        lambda value, content: seen.setdefault(value, []).append(content.copy()),
        threads=threads,
        progress=done.append,
    )
    session = onnxruntime.InferenceSession(TWO_VALUES.SerializeToString(), providers=["CPUExecutionProvider"])
    (right,) = session.run(["y"], {"x": IMAGES})
    assert count == 70
    assert done == [32, 64, 70]
    np.testing.assert_array_equal(np.concatenate(seen["x"]), IMAGES)
    np.testing.assert_array_equal(np.concatenate(seen["y"]), right)
    np.testing.assert_allclose(np.concatenate(seen["a"]), np.square(right), rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_first_value_in_the_graph_that_breaks_is_named(threads: int) -> None:
    broken = graph("a = Sub(x, x) b = Log(a) y = Neg(b)")
    with pytest.raises(PassRequirementError, match=r'"b".*Log'):
        observe(broken, ["a", "b", "y"], [IMAGES], lambda *_: None, threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_visitor_or_the_images_raise_arrives(threads: int) -> None:
    def visit(value: str, _content: npt.NDArray[np.float32]) -> None:
        if value == "y":
            raise KeyError(value)

    with pytest.raises(KeyError, match="y"):
        observe(TWO_VALUES, ["a", "y"], [IMAGES], visit, threads=threads)
    bad = IMAGES.copy()
    bad[40, 1] = np.nan
    with pytest.raises(PassRequirementError, match="calibration image 40 "):
        observe(TWO_VALUES, ["a", "y"], [bad], lambda *_: None, threads=threads)


@pytest.mark.parametrize(("threads", "runs"), [(1, 1), (2, 2)])
def test_no_more_values_are_held_than_of_this_run_and_the_one_ahead(
    threads: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs whose values are alive when another begins, itself included."""
    alive: list[weakref.ref[npt.NDArray[np.float32]]] = []
    held: list[int] = []
    make = module.evaluator

    def counting(*args: object, **options: object) -> object:
        run = make(*args, **options)  # type: ignore[arg-type]

        def counted(batch: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
            held.append(1 + sum(reference() is not None for reference in alive))
            results = run(batch)
            alive.append(weakref.ref(results[0]))
            return results

        return counted

    monkeypatch.setattr(module, "evaluator", counting)
    monkeypatch.setattr(module, "_MAX_BATCH", 2)
    observe(TWO_VALUES, ["a", "y"], [IMAGES], lambda *_: None, threads=threads)
    assert len(held) == 35
    assert max(held) <= runs, held
