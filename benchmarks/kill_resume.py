"""Kill the quick start at random moments, run it again, and compare with a run that was left alone.

    python benchmarks/kill_resume.py [--kills 10] [--seed 0] [--full]

Each kill is SIGKILL to the whole process group at a moment drawn uniformly from the duration of the undisturbed run.
The run after it must leave the same models (sha256), the same accuracy and parity, no damaged file, and must not
repeat what was finished. Latencies are measured anew, so they are not compared. Without ``--full`` training is cut
to two epochs, which leaves the steps and their order as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: What must be equal in report.json; the rest is timing.
SAME = ("name", "passes", "top1", "top1_drop", "size_bytes", "params", "macs", "parity", "status")
QUICK = [
    "--set", "variants.fp32.0.train.epochs=2",
    "--set", "variants.pruned.2.distill.epochs=2",
    "--set", "profile.budget_s=0.5", "--set", "profile.batch_sizes=[1]", "--set", "profile.rounds=6",
]  # fmt: skip


def command(out: Path, full: bool) -> list[str]:
    base = [sys.executable, "-m", "deploycnn", "compress", "quickstart", "--plain", "--out", str(out)]
    return base + ([] if full else QUICK)


def essence(out: Path) -> dict[str, Any]:
    """All of a finished run that may not depend on whether it was interrupted."""
    report = json.loads((out / "report.json").read_text())
    models = {}
    for manifest_path in sorted(out.glob("artifacts/*/manifest.json")):
        manifest = json.loads(manifest_path.read_text())
        models[manifest_path.parent.name] = {
            name: item["sha256"] for name, item in manifest["files"].items() if name != "log.txt"
        }
    variants = [{key: variant[key] for key in SAME} for variant in report["variants"]]
    return {
        "models": models,
        "variants": variants,
        "left over": [str(p) for p in out.glob("artifacts/.partial/*")],
    }


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is not the same, a line each: models by key, then values of variants."""
    lines = [
        f"model {key}: {name} differs"
        for key in expected["models"] | found["models"]
        for name in expected["models"].get(key, {}) | found["models"].get(key, {})
        if expected["models"].get(key, {}).get(name) != found["models"].get(key, {}).get(name)
    ]
    for one, other in zip(expected["variants"], found["variants"], strict=True):
        lines += [f"{one['name']}.{key}: {one[key]} / {other[key]}" for key in SAME if one[key] != other[key]]
    return lines + [f"left over: {path}" for path in found["left over"]]


def kill(out: Path, full: bool, moments: random.Random, duration: float) -> tuple[float, float]:
    """Start a run and kill it; the moment, and how long a run takes.

    A run that ended before its moment was not killed: it says how long runs take now, and another one is started.
    """
    while True:
        moment = moments.uniform(0, duration)
        started = time.monotonic()
        process = subprocess.Popen(
            command(out, full), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return moment, duration
        duration = time.monotonic() - started
        shutil.rmtree(out, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="the real quick start instead of two epochs")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        started = time.monotonic()
        subprocess.run(command(alone, arguments.full), check=True, capture_output=True)
        duration = time.monotonic() - started
        expected = essence(alone)
        print(f"undisturbed: {duration:.0f} s, {len(expected['models'])} artifacts")
        for number in range(1, arguments.kills + 1):
            out = Path(folder) / f"killed-{number}"
            moment, duration = kill(out, arguments.full, moments, duration)
            finished = {path.parent for path in out.glob("artifacts/*/manifest.json")}
            times = {path: (path / "manifest.json").stat().st_mtime_ns for path in finished}
            again = subprocess.run(command(out, arguments.full), capture_output=True, text=True, check=False)
            unlike = differences(expected, essence(out)) if again.returncode == 0 else []
            same = again.returncode == 0 and not unlike
            kept = all((path / "manifest.json").stat().st_mtime_ns == times[path] for path in finished)
            failures += not (same and kept)
            print(
                f"kill {number:2d} at {moment:5.1f} s with {len(finished)} artifacts made: "
                f"{'same result' if same else 'DIFFERENT'}, {'nothing repeated' if kept else 'REPEATED'}",
                flush=True,
            )
            for line in unlike or again.stderr[-2000:].splitlines() * bool(again.returncode):
                print(f"  {line}")
            shutil.rmtree(out, ignore_errors=True)
    print(f"{arguments.kills - failures} of {arguments.kills} as they should be")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
