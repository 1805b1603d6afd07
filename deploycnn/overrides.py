"""Command-line changes to a recipe before it is validated: ``--set``, ``--data`` and ``--weights``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploycnn import schema
from deploycnn.errors import RecipeError, nearest

#: Keys whose values are files: on the command line they are relative to the working directory.
FILE_KEYS = ("root", "weights", "path", "checkpoint", "onnx", "teacher_folder", "latency_table")


def apply(
    raw: dict[str, Any], settings: Sequence[str], *, data: Path | str | None, weights: Path | str | None
) -> None:
    """Apply ``--set``, ``--data`` and ``--weights`` to a recipe's plain values, in place.

    Raises:
        RecipeError: a setting has no value, its path leads nowhere, or the source takes no weights.
    """
    if data is not None:
        replace_data(raw, Path(data))
    if weights is not None:
        replace_weights(raw, Path(weights))
    for setting in settings:
        apply_setting(raw, setting)


def apply_setting(raw: dict[str, Any], setting: str) -> None:
    """Apply one ``a.b.0.c=value`` to a recipe's plain values, in place.

    Raises:
        RecipeError: the setting has no value, or its path leads nowhere.
    """
    path, separator, text = setting.partition("=")
    if not separator or not path:
        raise RecipeError(
            f'--set {setting}: expected key=value, for example "variants.int8.2.int8.calibrator=mse"'
        )
    value = schema.load_yaml(text, f"--set {path}")
    if isinstance(value, str) and path.rpartition(".")[2] in FILE_KEYS and Path(value).exists():
        value = str(Path(value).absolute())
    *parents, last = path.split(".")
    node: Any = raw
    walked: list[str] = []
    for part in parents:
        walked.append(part)
        if isinstance(node, list):
            node = node[_index(node, part, setting)]
        elif isinstance(node, dict):
            if part not in node and len(walked) > 1 and walked[0] in ("variants", "source"):
                raise RecipeError(
                    f"--set {setting}: {'.'.join(walked)}: no such key; {nearest(part, map(str, node))}"
                )
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise RecipeError(f"--set {setting}: {'.'.join(walked)} lies inside a plain value")
        node = _expand(raw, walked, node)
    if isinstance(node, list):
        node[_index(node, last, setting)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"--set {setting}: {'.'.join(walked)} is a plain value and has no keys")


def _expand(raw: dict[str, Any], walked: Sequence[str], node: Any) -> Any:
    """Turn a pass written as a bare name (``int8``) into ``{int8: {}}`` so that a setting may enter it."""
    if not isinstance(node, str) or len(walked) < 2:
        return node
    holder: Any = raw
    for part in walked[:-1]:
        holder = holder[int(part)] if isinstance(holder, list) else holder[part]
    expanded: dict[str, Any] = {node: {}}
    if isinstance(holder, list):
        holder[int(walked[-1])] = expanded
        return expanded
    return node


def _index(node: list[Any], part: str, setting: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise RecipeError(f'--set {setting}: "{part}" should be an index from 0 to {len(node) - 1}')
    return int(part)


def replace_data(raw: dict[str, Any], path: Path) -> None:
    """``--data``: use an ImageFolder, keeping the options if the recipe already uses one."""
    current = raw.get("data")
    options = current.get("imagefolder") if isinstance(current, Mapping) else None
    raw["data"] = {"imagefolder": {**(options or {}), "root": str(path.absolute())}}


def replace_weights(raw: dict[str, Any], path: Path) -> None:
    """``--weights``: another checkpoint for the same architecture.

    Raises:
        RecipeError: the recipe's source takes none.
    """
    source = raw.get("source")
    if not isinstance(source, dict):
        raise RecipeError("--weights: the recipe has no source that takes weights")
    main = "checkpoint" if "checkpoint" in source else "weights"
    source[main] = str(path.absolute())
