"""`Report`: what `fxckpt.explain` returns. Its data is an `Account`; this shows it."""

from __future__ import annotations

import json
import os

from fxckpt import markup, page, plotting, render
from fxckpt.account import Account


class Report(Account):
    """What a training step holds, what is saved and computed again, and why.

    The attributes are those of `fxckpt.account.Account`. `print` shows the report as text of at
    most 100 columns, notebooks show it with a picture.

    Example:
        >>> import torch, fxckpt
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64), torch.nn.Tanh()] * 8)
        >>> report = fxckpt.explain(model, torch.ones(512, 64), policy="nothing", device="a100")
        >>> report.saved < report.eager_saved
        True
    """

    def __str__(self) -> str:
        """The report as text."""
        return render.text(self)

    def _repr_html_(self) -> str:
        """The report for notebooks."""
        return markup.notebook(self)

    def to_json(self, indent: int | None = None) -> str:
        """What `to_dict` returns, as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        """The report as Markdown, with all rows of what backward reads."""
        return markup.markdown(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the memory over the step to a file: ".png", ".svg" or what matplotlib writes.

        Raises:
            FxckptError: if matplotlib is not installed, or the model runs in parts.
        """
        plotting.plot_memory(self, path)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page that needs nothing else: the memory over the step, and all rows.

        Args:
            path: Of the file.
        """
        page.write(self, path)
