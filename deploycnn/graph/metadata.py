"""What travels inside our ONNX files: preprocessing and class names; and what does not: exporters' notes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from onnx import GraphProto, ModelProto

from deploycnn.core import Json
from deploycnn.graph.model import subgraphs

PREPROCESSING = "deploycnn.preprocessing"
CLASSES = "deploycnn.classes"


def get_metadata(model: ModelProto) -> dict[str, str]:
    """The model's metadata as a dict."""
    return {entry.key: entry.value for entry in model.metadata_props}


def set_metadata(model: ModelProto, values: dict[str, str]) -> None:
    """Replace the model's metadata, sorted by key so that equal models are equal bytes."""
    del model.metadata_props[:]
    for key in sorted(values):
        model.metadata_props.add(key=key, value=values[key])


def describe_task(model: ModelProto, preprocessing: Json | None, classes: Sequence[str]) -> None:
    """Write preprocessing and class names, where known, into the model's metadata."""
    values = get_metadata(model)
    if preprocessing is not None:
        values[PREPROCESSING] = json.dumps(preprocessing, sort_keys=True)
    if classes:
        values[CLASSES] = json.dumps(list(classes))
    set_metadata(model, values)


def strip_exporter_notes(model: ModelProto) -> None:
    """Drop doc strings and per-node metadata.

    The dynamo exporter writes stack traces and FX nodes there: absolute paths of the exporting machine, and
    often more bytes than a small model's weights.
    """
    model.doc_string = ""
    _strip(model.graph)


def _strip(graph: GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        for inner in subgraphs(node):
            _strip(inner)
