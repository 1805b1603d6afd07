"""Do no harm: what is measured slower on integers stays float, and a graph that gains nothing is not shipped.

Profiles of both graphs tell which blocks lose time on integers. They only propose: a runtime fuses across borders, and
a float block between integer ones pays for the crossing. What is kept is decided by interleaved races of whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from onnx import ModelProto

from deploycnn.core import Json, Speed, Stopwatch
from deploycnn.graph.model import initializers, save_onnx
from deploycnn.quantization.structure import COMPUTE

#: Names of nodes that stay float -> the Q/DQ graph.
Build = Callable[[Collection[str]], ModelProto]

FLOAT, FULL = "float", "int8"

#: A block must lose this share of the integer graph's time to be worth a race.
_WORTH_RACING = 0.002

#: A mixed graph must be this much faster than the one on integers throughout: less is within what a loaded machine
#: makes of the same graph on another day, and the same recipe should give the same model.
_WORTH_MIXING = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Nodes between two borders: values through which everything passes.

    Attributes:
        nodes: Names of all nodes, in graph order.
        float_ms: Time of the block in the float graph.
        int8_ms: Time of the block in the fully quantized graph.
    """

    nodes: tuple[str, ...]
    float_ms: float
    int8_ms: float

    @property
    def loss_ms(self) -> float:
        """What integers cost here; negative where they gain."""
        return self.int8_ms - self.float_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Models timed side by side at one setting."""

    batch_size: int
    threads: int
    speeds: Mapping[str, Speed]

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "batch_size": self.batch_size,
            "threads": self.threads,
            "speeds": {name: asdict(speed) for name, speed in self.speeds.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Unharmed:
    """What to ship.

    Attributes:
        ship_float: Whether no quantized graph is faster: the float graph is what should be returned.
        keep_float: Nodes that stay float because their blocks are slower on integers; empty where none.
        words: The outcome in a sentence, with its numbers.
        runtime: That was timed.
        blocks: Blocks that were measured slower on integers, the worst first.
        races: In the order in which they were run; the last ones are of what is shipped.
    """

    ship_float: bool
    keep_float: frozenset[str]
    words: str
    runtime: str
    blocks: tuple[Block, ...]
    races: tuple[Race, ...]

    def to_json(self) -> Json:
        """The record."""
        return {
            "ship_float": self.ship_float,
            "keep_float": sorted(self.keep_float),
            "words": self.words,
            "runtime": self.runtime,
            "slower_blocks": [
                {
                    "first": block.nodes[0],
                    "last": block.nodes[-1],
                    "float_ms": block.float_ms,
                    "int8_ms": block.int8_ms,
                }
                for block in self.blocks
            ],
            "races": [race.to_json() for race in self.races],
        }


def do_no_harm(
    float_path: Path,
    model: ModelProto,
    build: Build,
    stopwatch: Stopwatch,
    folder: Path,
    *,
    settings: Sequence[tuple[int, int]] | None = None,
    keep_float: Collection[str] = (),
    whole: bool = False,
    budget_s: float = 2.0,
    tell: Callable[[str], None] = lambda _: None,
) -> Unharmed:
    """Leave in float what integers make slower.

    Args:
        float_path: The float model that the quantized one must beat.
        model: The prepared float graph that ``build`` quantizes; nodes named.
        build: From names of nodes that stay float (those of ``keep_float`` among them) to the Q/DQ graph.
        stopwatch: Of the target.
        folder: Empty; candidates are written there.
        settings: (batch size, threads) at which the model must not be slower; by default the stopwatch's own. The first
            one chooses blocks.
        keep_float: Nodes that stay float in any case.
        whole: The graph cannot be built with other nodes in float (its weights are trained): it ships as it is or not.
        budget_s: Seconds of timing for each model of each race.
        tell: Told what is being done.

    Raises:
        RuntimeUnavailable: a model cannot be timed.
    """
    asked = tuple(settings or stopwatch.settings)
    batch_size, threads = asked[0]
    fixed = frozenset(keep_float)
    full = _write(build(fixed), folder, FULL)
    tell("timing blocks in float and on integers")
    float_ms = stopwatch.layer_ms(float_path, batch_size=batch_size, threads=threads)
    int8_ms = stopwatch.layer_ms(full, batch_size=batch_size, threads=threads)
    blocks = slower_blocks(model, float_ms, int8_ms)
    candidates = {
        name: fixed | {node for block in chosen for node in block.nodes}
        for name, chosen in ({} if whole else _proposals(blocks)).items()
    }
    paths = {FLOAT: float_path, FULL: full}
    for name, kept in candidates.items():
        paths[name] = _write(build(kept), folder, name)
    races = [_race(stopwatch, paths, (batch_size, threads), budget_s, tell)]
    best = _best(races[0].speeds)
    for setting in asked[1:]:
        pair = {FLOAT: float_path, FULL: full, best: paths[best]}
        races.append(_race(stopwatch, pair, setting, budget_s, tell))
    chosen = best if _harmless(races, best) else FULL if _harmless(races, FULL) else FLOAT
    kept = candidates[chosen] - fixed if chosen in candidates else frozenset[str]()
    return Unharmed(
        ship_float=chosen == FLOAT,
        keep_float=kept,
        words=_words(chosen, best, kept, races, stopwatch.runtime) + _earlier(races),
        runtime=stopwatch.runtime,
        blocks=tuple(blocks),
        races=tuple(races),
    )


def slower_blocks(
    model: ModelProto, float_ms: Mapping[str, float], int8_ms: Mapping[str, float]
) -> list[Block]:
    """Blocks with a convolution or matrix product that lose time on integers, the worst first.

    Nodes that only a runtime knows (moves between layouts, leftover Q/DQ) count for the block of the last known node
    before them.

    Args:
        model: The float graph.
        float_ms: By node, in the order in which they ran.
        int8_ms: Likewise, of the quantized graph.
    """
    parts = split_blocks(model)
    number = {name: index for index, part in enumerate(parts) for name in part}
    spent = [_by_block(times, number, len(parts)) for times in (float_ms, int8_ms)]
    operators = {node.name: node.op_type for node in model.graph.node}
    total = sum(int8_ms.values())
    found = [
        Block(nodes=tuple(part), float_ms=before, int8_ms=after)
        for part, before, after in zip(parts, *spent, strict=True)
        if any(operators[name] in COMPUTE for name in part)
    ]
    worth = [block for block in found if block.loss_ms > _WORTH_RACING * total]
    return sorted(worth, key=lambda block: -block.loss_ms)


def split_blocks(model: ModelProto) -> list[list[str]]:
    """Names of the nodes between borders, in graph order; each part holds a convolution or matrix product."""
    graph = model.graph
    constants = set(initializers(graph))
    last_read: dict[str, int] = {value.name: len(graph.node) for value in graph.output}
    for index, node in enumerate(graph.node):
        for name in node.input:
            last_read[name] = max(last_read.get(name, 0), index)
    live = {value.name for value in graph.input} - constants
    parts: list[list[str]] = [[]]
    full = False
    for index, node in enumerate(graph.node):
        starts_another = full and node.op_type in COMPUTE and len(live) == 1
        if starts_another:
            parts.append([])
            full = False
        parts[-1].append(node.name)
        full |= node.op_type in COMPUTE
        live |= {name for name in node.output if last_read.get(name, -1) > index}
        live = {name for name in live if last_read.get(name, -1) > index}
    return parts


def _by_block(times: Mapping[str, float], number: Mapping[str, int], count: int) -> list[float]:
    spent = [0.0] * count
    current = 0
    for name, milliseconds in times.items():
        current = number.get(name, current)
        spent[current] += milliseconds
    return spent


def _proposals(blocks: Sequence[Block]) -> dict[str, list[Block]]:
    """Few sets of blocks to try in float: the worst, the worse half, all."""
    found = {"int8, worst block float": list(blocks[:1])} if blocks else {}
    if len(blocks) > 2:
        found["int8, worse half of slow blocks float"] = list(blocks[: (len(blocks) + 1) // 2])
    if len(blocks) > 1:
        found["int8, slow blocks float"] = list(blocks)
    return found


def _write(model: ModelProto, folder: Path, name: str) -> Path:
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.onnx"
    save_onnx(model, path)
    return path


def _race(
    stopwatch: Stopwatch,
    paths: Mapping[str, Path],
    setting: tuple[int, int],
    budget_s: float,
    tell: Callable[[str], None],
) -> Race:
    batch_size, threads = setting
    tell(f"racing {len(paths)} graphs at batch {batch_size}, {threads} threads")
    speeds = stopwatch.race(paths, batch_size=batch_size, threads=threads, budget_s=budget_s)
    return Race(batch_size=batch_size, threads=threads, speeds=speeds)


def _best(speeds: Mapping[str, Speed]) -> str:
    """The fastest quantized graph; a mixed one only where its interval lies clearly above the full one's ratio."""
    least = (1 + _WORTH_MIXING) * speeds[FULL].ratio
    mixed = [name for name in speeds if name not in {FLOAT, FULL} and speeds[name].low > least]
    return max(mixed, key=lambda name: speeds[name].ratio) if mixed else FULL


def _harmless(races: Sequence[Race], name: str) -> bool:
    """Nowhere slower than float, as far as was measured, and somewhere faster beyond doubt."""
    speeds = [race.speeds[name] for race in races]
    return all(speed.ratio >= 1.0 or speed.high >= 1.0 for speed in speeds) and any(
        speed.low > 1.0 for speed in speeds
    )


def _earlier(races: Sequence[Race]) -> str:
    """When that was found out, where it was not just now."""
    times = sorted({speed.earlier for race in races for speed in race.speeds.values() if speed.earlier})
    return f"; raced on {times[0]}, and kept on this machine" if times else ""


def _words(chosen: str, best: str, kept: Collection[str], races: Sequence[Race], runtime: str) -> str:
    shown = best if chosen == FLOAT else chosen
    figures = "; ".join(
        f"{race.speeds[shown].ratio:.2f}x ({race.speeds[shown].low:.2f}-{race.speeds[shown].high:.2f}) at batch "
        f"{race.batch_size}, {race.threads} thread{'s' if race.threads > 1 else ''}"
        for race in races
    )
    if chosen == FLOAT:
        return (
            f"no INT8 graph is faster than float in {runtime} at what was asked: {figures}; float is returned"
        )
    if kept:
        full = races[0].speeds[FULL].ratio
        return (
            f"{len(kept)} nodes stay float, where integers were slower; {figures} against float in {runtime} "
            f"(all on integers: {full:.2f}x)"
        )
    return f"integers throughout; {figures} against float in {runtime}"
