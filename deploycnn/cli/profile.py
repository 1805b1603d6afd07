"""``deploycnn profile``: measure models that exist."""

from __future__ import annotations

from pathlib import Path

import click

from deploycnn.cli.options import output_options


@click.command("profile", short_help="Measure and compare model files and runs.")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--recipe", help="Architecture, data and preprocessing for .pt and .safetensors files.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Image folder, or a zip of one, to measure accuracy on."
)
@click.option(
    "--runtime", "runtimes", multiple=True, help="Runtime, e.g. onnxruntime or openvino:bf16; repeatable."
)
@click.option(
    "--batch-size", "batch_sizes", multiple=True, type=click.IntRange(1), help="Repeatable. [default: 1]"
)
@click.option("--threads", multiple=True, help="A number or `all`; repeatable. [default: 1 and all]")
@click.option(
    "--budget-s",
    type=float,
    help="Seconds of timing for each model in each runtime, at each batch size and thread count. [default: 6]",
)
@click.option(
    "--trust-engine",
    is_flag=True,
    help="Load engines that no manifest vouches for. An engine is executable code.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory. [default: runs/profile-<time>]")
@output_options
def command(
    models: tuple[Path, ...],
    recipe: str | None,
    data: Path | None,
    runtimes: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    threads: tuple[str, ...],
    budget_s: float | None,
    trust_engine: bool,
    out: Path | None,
    as_json: bool,
    plain: bool,
    quiet: bool,
) -> int:
    """Measure MODELS side by side; the first is what the others are compared with.

    A model is an .onnx file, a .pt or .safetensors checkpoint (with --recipe), an engine or its folder, or a run
    directory (all of its variants). Accuracy needs images: --data, or the data of --recipe.
    """
    from deploycnn import profile_models as profiles
    from deploycnn.cli.compress import show
    from deploycnn.cli.console import Console

    with Console(plain=plain or None, quiet=quiet) as console:
        run = profiles.profile(
            *models,
            recipe=recipe,
            data=data,
            runtimes=runtimes,
            batch_sizes=batch_sizes or (1,),
            threads=tuple(profiles.parse_threads(text) for text in threads) or (1, "all"),
            budget_s=6.0 if budget_s is None else budget_s,
            trust_engine=trust_engine,
            out=out,
            events=console,
        )
    return show(run, as_json=as_json, plain=plain)
