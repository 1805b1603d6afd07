"""Look at every intermediate value of a graph while images stream through it, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper

from deploycnn.errors import ArtifactError, PassRequirementError
from deploycnn.graph.model import initializers, runtime_inputs, shape_of, value_types
from deploycnn.graph.parity import Evaluate, evaluator

#: Memory for the observed values of one run. Images are run in as large batches as fit into it.
ACTIVATION_BUDGET_BYTES = 2**28

_MAX_BATCH = 32

Images = npt.NDArray[np.float32]

#: Value name and its content for one batch.
Visit = Callable[[str, npt.NDArray[np.float32]], None]


def image_input(model: ModelProto) -> tuple[str, tuple[int | None, ...]]:
    """Name and shape (N, C, H, W) of the one input, ``None`` for dynamic axes.

    Raises:
        PassRequirementError: the model has several inputs, or its input is not a float32 batch of images.
    """
    inputs = runtime_inputs(model)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise PassRequirementError(
            f"the model must have one input, a batch of images; it has {len(inputs)}: {names}"
        )
    (value,) = inputs
    shape = shape_of(value)
    if value.type.tensor_type.elem_type != TensorProto.FLOAT or shape is None or len(shape) != 4:
        raise PassRequirementError(
            f'input "{value.name}" must be float32 images (N, C, H, W); it has shape {shape} and type '
            f"{TensorProto.DataType.Name(value.type.tensor_type.elem_type)}"
        )
    return value.name, shape


def float_values(model: ModelProto) -> list[str]:
    """Names of the input and all intermediate float32 values whose type is known, in graph order."""
    types = value_types(model)
    weights = initializers(model.graph)
    names = [value.name for value in runtime_inputs(model)]
    names += [name for node in model.graph.node for name in node.output if name and name not in weights]
    return [
        name
        for name in names
        if name in types and types[name].type.tensor_type.elem_type == TensorProto.FLOAT
    ]


def observe(
    model: ModelProto,
    values: Sequence[str],
    images: Iterable[npt.NDArray[np.float32]],
    visit: Visit,
    *,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
    check_values: bool = True,
) -> int:
    """Run ``images`` through ``model``, show ``visit`` each of ``values``, and return the number of images.

    Peak memory depends on the model, not on the number of images.

    Args:
        model: With inferred shapes.
        values: Names of float32 values.
        images: Batches (N, C, H, W) of any size; regrouped here.
        visit: Called once per value and run; with four threads or more, for several values at the same time.
        threads: CPU threads.
        progress: Called with the number of images done.
        check_values: Refuse NaN and infinity; ``False`` where ``visit`` does (``refuse_not_finite``).

    Raises:
        PassRequirementError: an image or a value is NaN or infinite (named), or the images do not fit the
        input.
    """
    name, shape = image_input(model)
    wanted = [value for value in dict.fromkeys(values) if value != name]
    run = evaluator(exposing(model, wanted), threads=threads, outputs=wanted)
    batch_size, fixed = _batch_size(model, wanted, shape[0])

    def show(value: str, content: npt.NDArray[np.float32]) -> None:
        if check_values:
            _check_finite(model, value, content)
        visit(value, content)

    def checked() -> Iterator[tuple[Images, int]]:
        first = 0
        for batch, count in _regroup(images, batch_size, pad=fixed):
            _check_images(batch, shape, name, first=first)
            first += count
            yield batch, count

    done = 0
    # The graph computes meanwhile, so half the threads look on.
    lookers = max(1, threads // 2)
    with ThreadPoolExecutor(lookers) as pool:
        each = pool.map if lookers > 1 else map
        for batch, count, results in _one_ahead(run if wanted else _nothing, checked(), threads=threads):
            if name in values:
                visit(name, batch[:count])
            contents = (_without_padding(content, len(batch), count) for content in results)
            # Taken from the iterator so that an exception of `show` arrives here.
            for _ in each(show, wanted, contents):
                pass
            # Let go before the next run begins.
            del results, contents
            done += count
            progress(done)
    return done


def _nothing(_images: Images) -> list[npt.NDArray[Any]]:
    return []


def _one_ahead(
    run: Evaluate, batches: Iterable[tuple[Images, int]], *, threads: int
) -> Iterator[tuple[Images, int, list[npt.NDArray[Any]]]]:
    """Each batch, how many of its images count, and what ``run`` makes of it.

    With several threads the next batch runs meanwhile: looking at values holds Python's lock much of the time, and
    running the graph does not. The values of two runs are held at most.

    Raises:
        PassRequirementError: the graph does not take such images.
    """

    def outcome(batch: Images) -> list[npt.NDArray[Any]]:
        try:
            return run(batch)
        except ArtifactError as error:
            raise PassRequirementError(
                f"images of shape {batch.shape}: {error}; give data with the preprocessing of the model"
            ) from error

    if threads == 1:
        for batch, count in batches:
            yield batch, count, outcome(batch)
        return
    running: tuple[Images, int, Future[list[npt.NDArray[Any]]]] | None = None
    with ThreadPoolExecutor(1) as pool:
        for batch, count in batches:
            finished, running = running, (batch, count, pool.submit(outcome, batch))
            if finished is not None:
                yield *finished[:2], finished[2].result()
        if running is not None:
            yield *running[:2], running[2].result()


def exposing(
    model: ModelProto, values: Iterable[str], kinds: Mapping[str, int] = MappingProxyType({})
) -> ModelProto:
    """``model`` with ``values`` as graph outputs, float32 where ``kinds`` (of ``TensorProto``) does not say."""
    exposed = ModelProto()
    exposed.CopyFrom(model)
    present = {value.name for value in exposed.graph.output}
    for value in values:
        if value not in present:
            kind = kinds.get(value, TensorProto.FLOAT)
            exposed.graph.output.append(helper.make_tensor_value_info(value, kind, None))
    return exposed


def _batch_size(model: ModelProto, values: Sequence[str], fixed: int | None) -> tuple[int, bool]:
    if fixed is not None:
        return fixed, True
    types = value_types(model)
    total = 0
    for value in values:
        shape = shape_of(types[value]) if value in types else None
        if shape is None or None in shape[1:]:
            return 1, False
        total += 4 * int(np.prod([dim for dim in shape[1:] if dim is not None], dtype=np.int64))
    return int(np.clip(ACTIVATION_BUDGET_BYTES // max(total, 1), 1, _MAX_BATCH)), False


def _regroup(
    batches: Iterable[npt.NDArray[np.float32]], size: int, *, pad: bool
) -> Iterator[tuple[npt.NDArray[np.float32], int]]:
    """Batches of exactly ``size`` images and how many of them count; the last may be smaller, or padded."""
    held: list[npt.NDArray[np.float32]] = []
    count = 0
    for batch in batches:
        for start in range(0, len(batch), size):
            piece = batch[start : start + size]
            while len(piece):
                room = size - count
                held.append(piece[:room])
                count += len(piece[:room])
                piece = piece[room:]
                if count == size:
                    yield np.concatenate(held), count
                    held, count = [], 0
    if count:
        last = np.concatenate(held)
        if pad and count < size:
            last = np.concatenate([last, np.repeat(last[-1:], size - count, axis=0)])
        yield last, count


def _without_padding(content: npt.NDArray[Any], batch: int, count: int) -> npt.NDArray[Any]:
    """The first ``count`` images of a value whose first axis is the batch."""
    return content[:count] if count < batch and content.ndim and len(content) == batch else content


def _check_images(batch: npt.NDArray[Any], shape: tuple[int | None, ...], name: str, *, first: int) -> None:
    if (
        batch.dtype != np.float32
        or batch.ndim != 4
        or any(want is not None and want != got for want, got in zip(shape[1:], batch.shape[1:], strict=True))
    ):
        raise PassRequirementError(
            f'images of shape {batch.shape} and type {batch.dtype} do not fit input "{name}", '
            f"which takes float32 {shape}; give data with that preprocessing"
        )
    finite = np.isfinite(batch).all(axis=(1, 2, 3))
    if not finite.all():
        bad = first + int(np.argmin(finite))
        raise PassRequirementError(
            f'calibration image {bad} (input "{name}") holds NaN or infinity; '
            "mend the data or its preprocessing"
        )


def _check_finite(model: ModelProto, value: str, content: npt.NDArray[np.float32]) -> None:
    # min and max carry NaN along, and need no second array.
    if content.size:
        refuse_not_finite(model, value, (content.min(), content.max()))


def refuse_not_finite(model: ModelProto, value: str, ends: tuple[Any, Any]) -> None:
    """Refuse a value whose smallest or largest elements (numbers or arrays) are NaN or infinite.

    Raises:
        PassRequirementError: names the value and its node.
    """
    if all(np.isfinite(end).all() for end in ends):
        return
    node = next((node for node in model.graph.node if value in node.output), None)
    made_by = f' of node "{node.name}" ({node.op_type})' if node is not None else ""
    raise PassRequirementError(
        f'value "{value}"{made_by} is NaN or infinite on calibration images; '
        "the model's weights are broken, or the images are not prepared as it expects"
    )
