"""Work that needs a process of its own: the request goes in as JSON on stdin, the answer is stdout's last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deploycnn
from deploycnn import errors
from deploycnn.errors import ArtifactError, DeployCNNError, RuntimeUnavailable


def ask(
    module: str,
    request: Mapping[str, Any],
    where: str,
    *,
    timeout_s: float = 600.0,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What ``python -m module`` answers.

    Args:
        module: Its ``main`` calls :func:`serve`.
        request: As plain values.
        where: Runtime and file, for errors.
        timeout_s: Seconds to wait.
        environ: Variables beside those of this process.

    Raises:
        DeployCNNError: the one that the child met.
        ArtifactError: the process dies of the work.
        RuntimeUnavailable: it did not end in time.
    """
    package_parent = str(Path(deploycnn.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    try:
        child = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(environ or {})},
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailable(f"{where}: no result within {timeout_s:.0f} s") from error
    return _read(child.returncode, child.stdout, child.stderr, where)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the child: answer the request on stdin."""
    try:
        found = {"answer": answer(json.load(sys.stdin))}
    except DeployCNNError as error:
        found = {"error": {"type": type(error).__name__, "message": str(error)}}
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def _read(returncode: int, stdout: str, stderr: str, where: str) -> dict[str, Any]:
    lines = stdout.strip().splitlines()
    try:
        said: Any = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        said = None
    if isinstance(said, Mapping) and isinstance(said.get("answer"), dict):
        answer: dict[str, Any] = said["answer"]
        return answer
    if isinstance(said, Mapping) and isinstance(said.get("error"), Mapping):
        kind = getattr(errors, str(said["error"]["type"]))
        raise kind(said["error"]["message"])
    if returncode < 0:
        raise ArtifactError(
            f"{where}: the process that ran it was killed by signal {-returncode} (no memory left?)"
        )
    raise RuntimeError(f"{where}: the child ended with {returncode} and without an answer:\n{stderr}")
