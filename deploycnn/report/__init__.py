"""Reports rendered from ``report.json`` alone, so that a laptop renders the run of a GPU host.

Light to import: the templates and their engine are loaded when a report is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploycnn import files


def write_reports(folder: Path, report: Mapping[str, Any]) -> dict[str, Path]:
    """Write ``report.json``, ``report.md`` and ``report.html`` to ``folder``, each at once.

    All are rendered before the first is written, and the JSON goes last: where it stands, the others do.

    Returns:
        "html", "md" and "json" -> the file.

    Raises:
        ArtifactError: ``report`` does not keep to the schema.
        StorageError: no space or no permission.
    """
    import json

    from deploycnn.report.html import render_html
    from deploycnn.report.markdown import render_markdown
    from deploycnn.report.schema import validate

    checked = validate(report)
    rendered = {
        "html": render_html(checked),
        "md": render_markdown(checked),
        "json": json.dumps(checked, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    paths = {kind: folder / f"report.{kind}" for kind in rendered}
    for kind, text in rendered.items():
        files.write_text(paths[kind], text)
    return paths


def read_report(path: Path) -> Mapping[str, Any]:
    """Read and check ``report.json`` (or the one in the run directory ``path``).

    Raises:
        ArtifactError: it is missing, not JSON, or of another schema version.
    """
    import json

    from deploycnn.errors import ArtifactError
    from deploycnn.report.schema import validate

    file = path / "report.json" if path.is_dir() else path
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: no report there; run `deploycnn compress` first") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file}: not a readable report ({error}); run the recipe again") from error
    return validate(value, str(file))
