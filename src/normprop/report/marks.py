"""One colour, marker and dash for each method, the same in every figure, told apart without colour vision."""

from dataclasses import dataclass

# Plotly's symbol names with the same shapes as paths in a 20 x 20 box, for the legend and the table.
SHAPES = {
    "circle": "M17 10a7 7 0 1 1-14 0a7 7 0 1 1 14 0Z",
    "square": "M4 4H16V16H4Z",
    "diamond": "M10 1.5L18.5 10L10 18.5L1.5 10Z",
    "triangle-up": "M10 2.5L18 16.5H2Z",
    "triangle-down": "M10 17.5L2 3.5H18Z",
    "cross": "M7 3h6v4h4v6h-4v4h-6v-4h-4v-6h4Z",
    "star": "M10 1l2.4 5.8 6.2.5-4.7 4 1.4 6.1-5.3-3.2-5.3 3.2 1.4-6.1-4.7-4 6.2-.5Z",
    "pentagon": "M10 2l8 5.8-3 9.2H5L2 7.8Z",
    "hourglass": "M4 3H16L4 17H16Z",
    "hexagon": "M10 2l7 4v8l-7 4-7-4V6Z",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
COLORS = 7  # numbered 0 to 6 in the style sheet; number 7 is the neutral grey of the plain network
_PLAIN = "none"


@dataclass(frozen=True)
class Mark:
    """How a method is drawn.

    Args:
        color: number of the colour in the style sheet.
        shape: a key of `SHAPES`.
        dash: dash of its lines.
    """

    color: int
    shape: str
    dash: str


def marks(methods: list[str]) -> list[Mark]:
    """Give each method a mark; colour and shape together are unique up to 63 methods.

    Args:
        methods: names in the order of the results; the plain network "none" is grey.

    Returns:
        A mark for each method, in the same order.

    Example:
        >>> [mark.color for mark in marks(["none", "normprop", "batch"])]
        [7, 0, 1]
    """
    shapes = [shape for shape in SHAPES if shape != "hexagon"]
    ranks = {method: rank for rank, method in enumerate(name for name in methods if name != _PLAIN)}
    return [
        Mark(COLORS, "hexagon", "solid")
        if method == _PLAIN
        else Mark(rank % COLORS, shapes[(rank + rank // COLORS) % len(shapes)], DASHES[rank // COLORS % len(DASHES)])
        for method in methods
        for rank in [ranks.get(method, 0)]
    ]
