"""A report as one page that needs nothing else: `page.html` with the account in it."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

from fxckpt import markup, render
from fxckpt.account import BEFORE, COLOURS, LIMIT, Account

_TEMPLATE = Path(__file__).with_name("page.html")


def write(account: Account, path: str | os.PathLike[str]) -> None:
    """Writes the page to a file."""
    Path(path).write_text(page(account), encoding="utf-8")


def page(account: Account) -> str:
    """The page: figures, the memory over the step, and a table of all rows."""
    data: dict[str, Any] = {
        **account.to_dict(),
        "rewritten": account.rewritten,
        "colours": COLOURS,
        "before_colour": BEFORE,
        "limit_colour": LIMIT,
    }
    # Nothing in the data may end the script that holds it.
    script = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    filled = {
        "TITLE": html.escape(render.title(account)),
        "FIGURES": markup.figures_as_html(account),
        "DATA": script,
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name, content in filled.items():
        text = text.replace(f"<!--{name}-->", content)
    return text
