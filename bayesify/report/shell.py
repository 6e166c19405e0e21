"""The shell of an HTML page: one file, no script, no request."""

from __future__ import annotations

import importlib.util
from importlib import resources
from typing import Any

from .. import __version__
from ..errors import ArgumentError


def check_installed(*further: str) -> None:
    """Whether what draws and fills a page is there, asked before long work.

    Args:
        *further: Packages that are needed beside jinja2 and matplotlib.

    Raises:
        ArgumentError: One is not installed.
    """
    needed = ("jinja2", "matplotlib", *further)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(
            f"A report needs {' and '.join(missing)}: pip install 'bayesify[report]'."
        )


def filled(template: str, **values: Any) -> str:
    """A file of ``assets`` with its values; text in them is escaped, ``Markup`` is not."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = (resources.files("bayesify") / "assets" / template).read_text("utf-8")
    return environment.from_string(text).render(version=__version__, **values)


def html_page(title: str, css: str, body: str) -> str:
    """A whole page.

    Args:
        title: As text.
        css: Its style.
        body: What stands in it, as HTML.

    Raises:
        ArgumentError: jinja2 or matplotlib is not installed.
    """
    check_installed()
    from markupsafe import Markup

    return filled("page.html.jinja", title=title, css=Markup(css), body=Markup(body))
