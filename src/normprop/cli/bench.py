"""`normprop bench`: what a training step of every method costs, as ratios to the network without normalisation."""

import json as json_format
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from normprop.cli.options import Json, Quiet, comma_list
from normprop.cli.output import screen
from normprop.errors import ConfigError, requires
from normprop.files import write_content

with requires("cli"):
    import typer
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

_METHODS = "none,batch,group,layer,weight,scaled-weight-standardized,normprop-paper,normprop"
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; by default its own choice.")]
Device = Annotated[str, typer.Option(help="auto, cpu, gpu, cuda or mps.")]


def bench(
    context: typer.Context,
    networks: Annotated[str, typer.Option(help="Comma list of nin, resnet18, mlp and unet3d.")] = "nin",
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", "--batch-size", help="Comma list.")] = "1,8,50,128",
    modes: Annotated[str, typer.Option("--modes", "--mode", help="Comma list of eager and compiled.")] = "eager",
    layouts: Annotated[
        str, typer.Option("--layouts", "--layout", help="Comma list of contiguous and channels-last.")
    ] = "contiguous",
    dtypes: Annotated[
        str, typer.Option("--dtypes", "--dtype", help="Comma list of float32 and bfloat16 (autocast).")
    ] = "float32",
    methods: Annotated[str, typer.Option(help="Comma list; none is added.")] = _METHODS,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each case; at least five rounds.")] = 20.0,
    width: Annotated[float, typer.Option(help="Factor on the networks' channels.")] = 1.0,
    threads: Threads = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Directory of bench.json and bench.md.")] = Path("runs/bench"),
    baseline: Annotated[Path | None, typer.Option(help="A bench.json to compare with.", show_default=False)] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time training steps: forward, backward and update, as ratios to the network without normalisation.

    All methods of a case take turns in one process. With --baseline the exit code is 1 if a ratio rose by more than the
    spread of both runs, that is if its quartiles lie above those of the baseline, or if more memory is held.
    """
    from normprop.experiments import bench_baseline
    from normprop.experiments.bench import bench as run
    from normprop.experiments.bench_table import markdown

    before = None if baseline is None else bench_baseline.load(baseline, width)
    with watch("cases", quiet=quiet or json) as progress:
        document = run(
            comma_list("--methods", methods, str, "methods"),
            networks=comma_list("--networks", networks, str, "networks"),
            batch_sizes=comma_list("--batch-sizes", batch_sizes, int, "whole numbers"),
            modes=comma_list("--modes", modes, str, "modes"),
            layouts=comma_list("--layouts", layouts, str, "layouts"),
            dtypes=comma_list("--dtypes", dtypes, str, "types"),
            seconds=seconds,
            width=width,
            device=prepare(threads, device),
            progress=progress,
            command=shlex.join(["normprop", *context.obj]),
        )
    text = json_format.dumps(document, indent=2, allow_nan=False)
    for name, content in (("bench.json", f"{text}\n"), ("bench.md", markdown(document))):
        save(out / name, content)
    if json:
        print(text)
    else:
        _print(document)
        print(out / "bench.md")
    if before is not None and _rose(bench_baseline.compare(document, before)):
        raise typer.Exit(1)


def prepare(threads: int | None, device: str) -> Any:
    """Set the number of threads and find the device.

    Args:
        threads: of torch, None for its own choice.
        device: auto, cpu, gpu, cuda or mps.

    Returns:
        The device.

    Raises:
        ConfigError: if there is none of that name here.
    """
    import torch

    from normprop.experiments import machine

    if device not in ("auto", "cpu", "gpu", "cuda", "mps"):
        raise ConfigError(f"--device must be auto, cpu, gpu, cuda or mps, got {device!r}")
    found = machine.device(device)
    if device != "auto" and found.type != device and (device != "gpu" or found.type == "cpu"):
        raise ConfigError(f"--device {device}: torch finds no such device here, only {found.type}; leave --device out")
    if threads is not None:
        torch.set_num_threads(threads)
    return found


def save(path: Path, text: str) -> None:
    """Write a file of results whole.

    Args:
        path: the file.
        text: its content.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        write_content(path, text)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {path} ({error.strerror}); name another directory") from error


@contextmanager
def watch(what: str, *, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Show the progress of a run on standard error: a bar on a terminal, a line for each step elsewhere.

    Args:
        what: what the steps are called.
        quiet: show nothing.

    Returns:
        A context that gives the callback, called with the steps done, all steps, and the next one in words.
    """
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield None
    elif console.is_terminal:
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, TextColumn("{task.description}", style="dim"), console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, words: bar.update(task, completed=done, total=total, description=words)
    else:
        yield lambda done, total, words: print(f"{done}/{total} {what} {words}".rstrip(), file=sys.stderr, flush=True)


def _print(document: Mapping[str, Any]) -> None:
    """One table for each case, and what was measured."""
    from normprop.experiments.bench_table import HEADINGS, has_peaks, introduction, tables

    console = screen()
    headings = HEADINGS if has_peaks(document) else HEADINGS[:-1]
    for case, rows in tables(document):
        table = Table(title=case, title_justify="left", box=box.SIMPLE_HEAD)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
        reasons = [row for row in rows if len(row) == 2]
        for row in rows:
            if row not in reasons:
                table.add_row(*row)
        console.print(table)
        for method, reason in reasons:
            console.print(f"{method} cannot run: {reason}", style="yellow", markup=False)
    for sentence in introduction(document):
        console.print(sentence, style="dim", markup=False)


def _rose(comparison: Any) -> bool:
    """Say on standard error what rose."""
    for remark in comparison.remarks:
        print(remark, file=sys.stderr)
    for rise in comparison.rises:
        print(rise, file=sys.stderr)
    if not comparison.rises:
        print(f"No ratio of {comparison.compared} rows rose by more than the spread of both runs.", file=sys.stderr)
    return bool(comparison.rises)
