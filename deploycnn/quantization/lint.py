"""Check a Q/DQ file, whoever made it, against the rules of the target that it is meant for.

The float graph inside the file is placed anew by our own rules, and what the file rounds is compared with it: so
lint and quantizer cannot disagree. Layers that the file leaves float are taken as meant so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx.inliner

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import QUANTIZED_OPS, copy_of, is_quantized, load_onnx, subgraphs
from deploycnn.quantization import packs
from deploycnn.quantization.guards import requantized_layers
from deploycnn.quantization.isa import Isa, detect_isa
from deploycnn.quantization.lint_edges import edge_findings
from deploycnn.quantization.lint_numbers import number_findings, storage_findings
from deploycnn.quantization.lint_rules import RULES, Finding, rule
from deploycnn.quantization.packed import unpack
from deploycnn.quantization.reading import read_qdq

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

    from deploycnn.quantization.packs import RulePack

#: Operators of other quantization formats.
_FOREIGN = frozenset({"DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QGemm", "QAttention"})

#: Rules that are milder on a target, whose runtime copes.
_MILDER = {
    "openvino": frozenset({"QDQ002", "QDQ104", "QDQ105"}),
    # onnxruntime rounds float biases when it loads a file.
    "onnxruntime-cpu": frozenset({"QDQ009"}),
    "cpu": frozenset({"QDQ009"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LintReport:
    """What lint found.

    Attributes:
        model: The file.
        target: The target whose rules were applied.
        isa: The CPU whose arithmetic they are for; empty for GPUs.
        findings: By severity, then rule, then in graph order.
        note: What a user should know of the target.
    """

    model: str
    target: str
    isa: str
    findings: tuple[Finding, ...]
    note: str

    def count(self, severity: str) -> int:
        """How many findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def clean(self) -> bool:
        """Whether there is nothing but notes."""
        return not self.count("error") and not self.count("warning")

    def to_json(self) -> Json:
        """The report as plain values."""
        counts = {f"{name}s": self.count(name) for name in ("error", "warning", "note")}
        return {**asdict(self), **counts, "clean": self.clean}


def lint_model(
    model: Path | str, target: str = "cpu", *, ignore: Collection[str] = (), isa: Isa | None = None
) -> LintReport:
    """Check a quantized ONNX file.

    Args:
        model: The file.
        target: "cpu", "onnxruntime-cpu", "openvino", "onnxruntime-cuda", "tensorrt" or "tensorrt-rtx".
        ignore: Rules to leave out.
        isa: The CPU that it will run on; this one by default.

    Raises:
        ArtifactError: the file is missing, damaged or not ONNX.
        PassRequirementError: it is not quantized, or is within a branch or loop.
        RecipeError: there is no such target or rule.
    """
    for identifier in ignore:
        rule(identifier)
    path = Path(model)
    pack = packs.get(target, isa or detect_isa())
    here = (isa or detect_isa()) if pack.style == "units" else None
    loaded = load_onnx(path)
    if loaded.functions:
        loaded = onnx.inliner.inline_local_functions(loaded)
    if any(_holds_qdq(inner) for node in loaded.graph.node for inner in subgraphs(node)):
        raise PassRequirementError(
            f"{path}: has Q/DQ inside a branch or loop, where lint does not look; export it without control flow"
        )
    if not is_quantized(loaded):
        raise PassRequirementError(f"{path}: not quantized, so there is nothing to lint; quantize it first")
    findings = [finding for finding in lint_graph(loaded, pack) if finding.rule not in ignore]
    return LintReport(
        model=str(path),
        target=target,
        isa=here.name if here is not None else "",
        findings=tuple(findings),
        note=pack.note,
    )


def _holds_qdq(graph: GraphProto) -> bool:
    """Whether a branch or loop, or one inside it, is quantized."""
    return any(
        node.op_type in QUANTIZED_OPS or any(_holds_qdq(inner) for inner in subgraphs(node))
        for node in graph.node
    )


def lint_graph(model: ModelProto, pack: RulePack) -> tuple[Finding, ...]:
    """Check a quantized graph against rules.

    Raises:
        PassRequirementError: its float graph cannot be brought to an opset that placement knows.
    """
    foreign = [
        node for node in model.graph.node if node.op_type in _FOREIGN or node.op_type.startswith("QLinear")
    ]
    found = [
        ("QDQ001", node.name or node.output[0], f"{node.op_type} is no Q/DQ; other runtimes cannot use it")
        for node in foreign
    ]
    if not foreign:
        plain = copy_of(model)
        unpack(plain)
        reading = read_qdq(plain)
        only_weights = bool(reading.constants) and not reading.activations and not reading.outputs
        found = list(storage_findings(model, pack, only_weights=only_weights))
        if only_weights:
            pack = packs.weights_only(pack)
        read = (*number_findings(reading, pack), *edge_findings(reading, pack))
        if pack.guards_float and pack.target != "openvino":
            found += [
                (
                    "QDQ113",
                    node.name or node.output[0],
                    f"{node.op_type} with float weights, between DQ and Q",
                )
                for node in requantized_layers(plain)
            ]
        found += dict.fromkeys(
            (identifier, reading.lifted.get(node, node), what) for identifier, node, what in read
        )
    milder = _MILDER.get(pack.target, frozenset[str]())
    findings = []
    for identifier, node, what in found:
        which = RULES[identifier]
        severity = "warning" if identifier in milder else which.severity
        findings.append(Finding(rule=identifier, severity=severity, node=node, what=what, mend=which.mend))
    order = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(findings, key=lambda finding: (order[finding.severity], finding.rule)))
