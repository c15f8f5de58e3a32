"""The page of a reproduction: Markdown with a table and one figure beside it."""

from collections.abc import Sequence

from normprop.experiments.reproduce.reproduction import Reproduction, Table
from normprop.report.plots import svg


def figure(reproduction: Reproduction) -> str:
    """Draw a reproduction's figures as one SVG document."""
    return svg(reproduction.figures)


def markdown(reproduction: Reproduction, command: str, picture: str) -> str:
    """Write a reproduction as Markdown.

    Args:
        reproduction: what was found.
        command: that made it.
        picture: name of the SVG file beside the page.

    Returns:
        The page.
    """
    scale = "at the scale of the paper" if reproduction.scale == "paper" else "a small reproduction"
    parts = [
        f"# {reproduction.title}",
        f"{reproduction.paper}; {scale}.",
        f"![{'; '.join(figure.title for figure in reproduction.figures)}]({picture})",
        _table(reproduction.table),
        _list("As in the paper", reproduction.agrees),
        _list("Not as in the paper", reproduction.contradicts),
        _list("Notes", reproduction.notes),
        f"## Protocol\n\n{' '.join(filter(None, (reproduction.protocol, reproduction.differs_from_paper)))}",
        f"    {command}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(table: Table) -> str:
    rows = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _list(head: str, sentences: Sequence[str]) -> str:
    return f"## {head}\n\n" + "\n".join(f"- {sentence}" for sentence in sentences) if sentences else ""
