"""Draws the pictures of docs/how-it-works.md: the joint graph of a tiny model, and its memory.

python docs/drawings.py      # writes docs/images/joint.svg and docs/images/step.svg
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.fx import Node

import fxckpt
from fxckpt.capture import capture
from fxckpt.joint import Joint, root

IMAGES = Path(__file__).parent / "images"
STYLE = {"svg.hashsalt": "fxckpt", "font.size": 9}  # equal files for equal runs
SAVED, AGAIN, PLAIN = "#0072B2", "#E69F00", "#999999"  # of Okabe and Ito


class Gate(nn.Module):
    """Two products with dropout between them, as in docs/how-it-works.md."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop = nn.Linear(4, 64, bias=False), nn.Dropout(0.5)
        self.down = nn.Linear(64, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape of `x`."""
        return self.down(self.drop(torch.tanh(self.up(x))))


def rows(joint: Joint) -> dict[Node, tuple[float, float]]:
    """Where each operation stands: forward going down on the left, backward up on the right.

    Views are left out: they have no memory.
    """
    forward = [n for n in joint.forward_nodes() if root(n) is n]
    backward = [n for n in joint.backward_nodes() if root(n) is n]
    places = {n: (0.0, -float(i)) for i, n in enumerate(forward)}
    step = (len(forward) - 1) / max(len(backward) - 1, 1)
    places |= {n: (1.0, -(len(forward) - 1) + i * step) for i, n in enumerate(backward)}
    return places


def draw_joint(path: Path) -> None:
    """The joint graph of `Gate`, with what `policy="dots"` saves and recomputes."""
    model, x = Gate(), torch.randn(32, 4)
    tape = capture(model.forward, (x,), module=model)
    joint = tape.joint(tape.expected_backward())
    plan_of = fxckpt.rewrite(model, policy="dots", example_inputs=(x,))
    backward = {n.name for n in fxckpt.graphs(plan_of)[1].graph.nodes}
    arguments = {n.name for n in fxckpt.graphs(plan_of)[1].graph.nodes if n.op == "placeholder"}
    places = rows(joint)
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(figsize=(6.4, 4.6))
    for node, (column, y) in places.items():
        for read in map(root, node.all_input_nodes):
            if read in places:
                _arrow(axes, places[read], places[node])
        kept = not column and node.name in arguments
        again = not column and not kept and node.name in backward
        color = SAVED if kept else AGAIN if again else PLAIN
        style = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": color}
        axes.text(column, y, node.name, ha="center", va="center", bbox={**style, "linewidth": 2})
    bottom = min(y for _, y in places.values())
    for x_of, what in ((0, "forward"), (1, "backward")):
        axes.text(x_of, 1, what, ha="center", va="center", weight="bold")
    for color, what in ((SAVED, "saved"), (AGAIN, "computed again"), (PLAIN, "other")):
        axes.plot([], [], "s", color=color, label=what)
    axes.legend(loc="center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False)
    axes.set(xlim=(-0.5, 1.5), ylim=(bottom - 0.9, 1.5))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    same = start[0] == end[0]
    bend = "arc3,rad=0.45" if same and abs(start[1] - end[1]) > 1.5 else "arc3"
    shape = {"arrowstyle": "-|>", "color": "#bbbbbb", "shrinkA": 12, "shrinkB": 12}
    if not same:
        shape |= {"linestyle": ":", "shrinkA": 30, "shrinkB": 30}
    axes.annotate("", end, start, arrowprops={**shape, "connectionstyle": bend}, zorder=0)


def draw_step(path: Path) -> None:
    """Memory over a step of a chain of layers, as it is and within half of that."""
    layers = [m for _ in range(8) for m in (nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1))]
    model = nn.Sequential(*layers)
    fxckpt.explain(model, torch.randn(4096, 64), budget=0.5, device="a100").plot(path)


if __name__ == "__main__":
    draw_joint(IMAGES / "joint.svg")
    draw_step(IMAGES / "step.svg")
