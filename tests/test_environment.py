from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib import metadata

import pytest

from deploycnn import environment
from deploycnn.environment import Environment, Nvidia, detect, parse_cpuinfo, parse_nvidia_smi
from deploycnn.errors import ArtifactError

X86 = """processor\t: 0
model name\t: AMD EPYC 9R14
flags\t\t: fpu vme avx avx2 fma avx512f avx512_vnni avx512_bf16 nonsense

processor\t: 1
model name\t: other
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd asimdhp asimddp i8mm bf16 sve\n"
BANNER = "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: 13.0     |"


def test_x86_and_arm_tell_what_matters() -> None:
    name, isa = parse_cpuinfo(X86)
    assert name == "AMD EPYC 9R14"
    assert isa == ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16")
    assert parse_cpuinfo(ARM) == ("", ("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"))
    assert parse_cpuinfo("") == ("", ())


def test_nvidia_smi_is_read() -> None:
    found = parse_nvidia_smi("NVIDIA L4, 580.65.06\nNVIDIA L4, 580.65.06\n", BANNER)
    assert found == Nvidia(gpus=("NVIDIA L4", "NVIDIA L4"), driver="580.65.06", cuda="13.0")
    assert parse_nvidia_smi("", BANNER) is None
    old = parse_nvidia_smi("Tesla K80, 390.1", "no cuda line")
    assert old is not None
    assert old.cuda == ""


def test_detecting_twice_gives_the_same_machine() -> None:
    first, second = detect(), detect()
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64
    assert first.cores >= 1
    assert first.memory_bytes > 2**28
    assert first.torch == metadata.version("torch")


def test_detecting_loads_no_runtime() -> None:
    code = (
        "import sys; from deploycnn.environment import detect; detect();"
        "print([m for m in ('torch', 'onnxruntime', 'openvino', 'tensorrt', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["cpu", "gpu", "driver", "cuda", "tensorrt", "onnxruntime", "openvino", "torch"]
)
def test_what_matters_enters_the_fingerprint(name: str) -> None:
    here = detect()
    assert dataclasses.replace(here, **{name: "other"}).fingerprint != here.fingerprint


@pytest.mark.parametrize(
    "change", [{"power": "powersave"}, {"os": "x"}, {"python": "3.14"}, {"memory_bytes": 1}]
)
def test_what_changes_from_boot_to_boot_does_not(change: dict[str, object]) -> None:
    here = detect()
    assert dataclasses.replace(here, **change).fingerprint == here.fingerprint  # type: ignore[arg-type]


def test_an_environment_survives_its_json() -> None:
    here = detect()
    assert Environment.from_json(json.loads(json.dumps(here.to_json()))) == here


@pytest.mark.parametrize(
    "damage",
    [{"cores": "two"}, {"isa": "avx"}, {"extra": 1}, {"cpu": None}],
    ids=lambda damage: next(iter(damage)),
)
def test_a_damaged_environment_is_named(damage: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match=r"^e\.json: "):
        Environment.from_json({**detect().to_json(), **damage}, "e.json")
    with pytest.raises(ArtifactError, match="JSON object"):
        Environment.from_json([])


def test_versions_tell_which_distribution_it_is() -> None:
    def find(installed: dict[str, str]) -> object:
        def version(name: str) -> str:
            if name not in installed:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        return version

    assert environment.version("onnxruntime", find({"onnxruntime-gpu": "1.30"})) == "1.30 (gpu)"  # type: ignore[arg-type]
    assert environment.version("onnxruntime", find({"onnxruntime": "1.30"})) == "1.30"  # type: ignore[arg-type]
    assert environment.version("tensorrt", find({})) == ""  # type: ignore[arg-type]
