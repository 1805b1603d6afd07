"""What can be said of the images without an engine to build them: they are linted, and hold what they promise."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (it has no wheel for this platform)")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_images_run_as_nobody_special_and_know_whether_they_are_well(path: Path) -> None:
    text = path.read_text()
    last = text[text.rindex("\nFROM ") :]
    users = re.findall(r"^USER (\S+)$", last, re.MULTILINE)
    assert users == ["10001"]
    assert last.index("USER 10001") < last.index("ENTRYPOINT")
    assert re.search(r'^HEALTHCHECK .*CMD \["deploycnn", "doctor"\]$', last, re.MULTILINE)
    assert "pip install" not in last, "what is built stays in the first stage"
    for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        for name in re.findall(r"\$\{(\w+)\}", image):
            assert re.search(rf"^ARG {name}=\S*\d", text, re.MULTILINE), f"{image} is not pinned"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_that_is_copied_reaches_the_builder(path: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", path.read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert source in kept


def test_versions_are_pinned_once_and_cover_what_is_required() -> None:
    import tomllib

    lines = [line for line in (DOCKER / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert len(set(pinned)) == len(pinned)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in ("cpu", "openvino", "timm", "gpu", "pycuda"):
        wanted += project["optional-dependencies"][extra]
    names = {re.split(r"[><=;\[ ]", item)[0].lower().replace("_", "-") for item in wanted}
    assert names - set(pinned) <= {"setuptools"}


def test_compose_reserves_a_gpu() -> None:
    content = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = content["services"]
    [device] = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in services["cpu"]
    for service in services.values():
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert service["security_opt"] == ["no-new-privileges:true"]
