"""``deploycnn inspect``: a model's layers, and what they cost."""

from __future__ import annotations

import re
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from deploycnn.models.inspection import LayerRow, ModelTable


_T = TypeVar("_T")

#: Columns that names of layers get before a column is left out, and at least.
_NAME_WIDTH, _LEAST_NAME_WIDTH = 24, 12
#: Columns that kinds of layers are cut to where room is short.
_KIND_WIDTH = 11


def _image_shape(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """(C, H, W) from ``224``, ``HxW`` or ``CxHxW``."""
    if value is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", value):
        raise click.BadParameter(f'"{value}" is no image size; write 224, HxW (240x320) or CxHxW (1x28x28)')
    sizes = tuple(int(part) for part in value.split("x"))
    return {1: (3, *sizes, *sizes), 2: (3, *sizes), 3: sizes}[len(sizes)]


@click.command(
    "inspect", short_help="Show a model's layers: shapes, parameters, MACs, receptive field, memory."
)
@click.argument("model")
@click.option(
    "--input-size",
    callback=_image_shape,
    metavar="SIZE",
    help="Image size: 224, HxW or CxHxW. [default: the model's own]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON on standard output.")
def command(model: str, input_size: tuple[int, ...] | None, as_json: bool) -> None:
    """Show the layers of MODEL, for one image, and their totals.

    MODEL is an .onnx file, a torch artifact (a folder with model.safetensors and architecture.json), or a
    source and a name: zoo:resnet20, torchvision:resnet18, timm:NAME (with random weights).
    """
    from deploycnn import schema
    from deploycnn.cli.console import echo, print_json

    table = inspect_spec(model, input_size)
    if as_json:
        print_json(schema.to_json(table))
        return
    for line in render(table, shutil.get_terminal_size((100, 24)).columns):
        echo(line)


def inspect_spec(model: str, input_shape: tuple[int, ...] | None) -> ModelTable:
    """Inspect a file, an artifact's folder, or ``source:name``.

    Raises:
        DeployCNNError: there is no such model or source, or the file is damaged.
    """
    from deploycnn.models.inspection import inspect_model

    source, colon, name = model.partition(":")
    if not colon or Path(model).exists():
        return inspect_model(model, input_shape)
    from deploycnn import registry, schema
    from deploycnn.core import Context

    cls = registry.get("source", source)
    options: dict[str, object] = {cls.main: name}
    if input_shape is not None and "input_size" in schema.field_names(cls):
        options["input_size"] = list(input_shape[1:])
    component = schema.build(cls, options, f"{source}:{name}")
    # The source itself builds the model, so that what is shown is what a recipe gets, also from a plug-in.
    with tempfile.TemporaryDirectory(prefix="deploycnn-inspect-") as folder:
        output, scratch = Path(folder) / "output", Path(folder) / "scratch"
        output.mkdir()
        scratch.mkdir()
        draft = component.run(Context(output=output, scratch=scratch))
        shape = input_shape or _shape(draft.inputs[0].shape)
        return inspect_model(output if draft.format == "torch" else output / "model.onnx", shape, name=model)


def _shape(stated: tuple[int | None, ...]) -> tuple[int, ...] | None:
    """(C, H, W) of an input, or ``None`` where the graph leaves one open."""
    known = tuple(size for size in stated[1:] if size is not None)
    return known if len(known) == len(stated) - 1 else None


def render(table: ModelTable, width: int) -> list[str]:
    """The table and its totals as lines; names and kinds are cut to what ``width`` leaves for them.

    Where that is too little, the column of inputs goes first (they are the outputs of the row above), then that of
    receptive fields.
    """
    from deploycnn.report import words
    from deploycnn.report.text import aligned

    titles = ["layer", "kind", "input", "output", "params", "MACs", "field", "memory"]
    numeric = [False] * 4 + [True] * 4
    rows = [_row(row) for row in table.rows]
    for name, least, kinds in (("input", _NAME_WIDTH, None), ("field", _LEAST_NAME_WIDTH, _KIND_WIDTH)):
        shortest = [[row[0], row[1][:kinds], *row[2:]] for row in rows]
        if _width(titles, shortest) - _column(titles, shortest, 0) + least > width:
            index = titles.index(name)
            titles, numeric = _without(titles, index), _without(numeric, index)
            rows = [_without(row, index) for row in rows]
    others = _width(titles, rows) - _column(titles, rows, 0) - _column(titles, rows, 1)
    room = max(_KIND_WIDTH, width - others - min(_NAME_WIDTH, _column(titles, rows, 0)))
    rows = [[row[0], _head(row[1], room), *row[2:]] for row in rows]
    names = max(_LEAST_NAME_WIDTH, width - others - _column(titles, rows, 1))
    rows = [[_tail(row[0], names), *row[1:]] for row in rows]
    size = "x".join(str(value) for value in table.input_shape) or "(size not stated, see --input-size)"
    macs = f"{words.scaled(table.macs)} MACs" if table.macs is not None else "MACs unknown"
    memory = (
        f"activations {words.scaled(table.activation_bytes, 'B')}, "
        f"at least {words.scaled(table.peak_activation_bytes, 'B')} at once"
    )
    totals = f"{words.clean(table.name)}: {table.params:,} params, {macs}, {memory}; one {size} image"
    return [
        *aligned(titles, rows, numeric),
        "",
        *textwrap.wrap(totals, max(width, 40), break_long_words=False),
    ]


def _row(row: LayerRow) -> list[str]:
    from deploycnn.report import words

    return [
        words.clean(row.name),
        words.clean(row.kind),
        "x".join(str(size) for size in row.input_shape),
        "x".join(str(size) for size in row.output_shape),
        f"{row.params:,}" if row.params else "",
        "?" if row.macs is None else words.scaled(row.macs) if row.macs else "",
        "x".join(str(size) for size in row.receptive_field) if row.receptive_field else "",
        words.scaled(row.activation_bytes, "B"),
    ]


def _tail(text: str, width: int) -> str:
    """``text``, cut at its front: the end of a layer's name is what tells it apart."""
    return text if len(text) <= width else f"…{text[len(text) - width + 1 :]}"


def _head(text: str, width: int) -> str:
    """``text``, cut at its end."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _without(values: list[_T], index: int) -> list[_T]:
    return [*values[:index], *values[index + 1 :]]


def _column(titles: list[str], rows: list[list[str]], index: int) -> int:
    return max(len(row[index]) for row in [titles, *rows])


def _width(titles: list[str], rows: list[list[str]]) -> int:
    return sum(_column(titles, rows, index) for index in range(len(titles))) + 2 * (len(titles) - 1)
