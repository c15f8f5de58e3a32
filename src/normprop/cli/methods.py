"""`normprop methods`: every normaliser and what was measured of it."""

import dataclasses
import json as json_format
from typing import Annotated

from normprop.cli.options import Json
from normprop.cli.output import screen
from normprop.errors import requires

with requires("cli"):
    import typer
    from rich import box
    from rich.table import Table


def methods(
    name: Annotated[str | None, typer.Argument(help="Tell more about one method.", show_default=False)] = None,
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the documentation.")] = False,
) -> None:
    """List every method with facts measured on a small network of its blocks."""
    from normprop import norms
    from normprop.norms import table

    if markdown:
        print(table.markdown(), end="")
        return
    facts = [norms.info(method) for method in (norms.names() if name is None else [name])]
    if json:
        print(json_format.dumps([dataclasses.asdict(method) for method in facts], indent=2))
        return
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("method", *table.HEADINGS.values()):
        shown.add_column(heading, no_wrap=heading == "method")
    for method in facts:
        shown.add_row(method.name, *table.cells(method))
    console = screen()
    console.print(shown)
    if name is None:
        console.print("normprop methods NAME tells a method's paper and when to use it.", style="dim")
    else:
        console.print(f"{facts[0].paper}\n\n{table.usage(name)}")
