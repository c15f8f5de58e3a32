"""The pages' templates."""

from importlib.resources import files
from typing import Any

from normprop.errors import requires

with requires("report"):
    from jinja2 import Environment, PackageLoader, StrictUndefined, Template
    from markupsafe import Markup


def asset(name: str) -> Markup:
    """A file of our own that goes into a page as it is.

    Example:
        >>> str(asset("page.css")[:5])
        ':root'
    """
    return Markup((files("normprop.report") / "assets" / name).read_text(encoding="utf-8"))


def template(name: str, **filters: Any) -> Template:
    """A template of the assets, in which what is not defined is an error.

    Args:
        name: its file.
        **filters: functions that it may apply.

    Returns:
        The template, to render.

    Example:
        >>> template("conversion.html.j2").name
        'conversion.html.j2'
    """
    environment = Environment(
        loader=PackageLoader("normprop.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters.update(filters)
    return environment.get_template(name)
