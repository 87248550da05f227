"""Plans for models of ordinary size, on fake tensors: overhead, bound and gap for each budget.

python bench/planner.py                              all models
python bench/planner.py --model gpt2 resnet50 --budget 50 30 --write bench/results/plans.md

Budgets are in per cent of what eager holds at its peak, parameters included; where a row is empty,
no plan was found. Nothing is run: times are those of the cost model, for an H200 in bfloat16
(language models) and a V100 in float32 (vision). Seconds are those of one processor core that
planning takes, for one budget after the other.

The second table has a plan for exactly the peak of each of several strategies, the ratio of its
overhead to theirs, that of the bound (no plan has a lower ratio), and the ratio where regions are
recomputed to the end. Strategies by name are simulated as `torch.utils.checkpoint` runs them, in
eager's order of backward: the whole region at once, with early stop, which is its default, and "to
the end" without. Its measured peaks are up to 3 % above the simulated ones (`tests/test_usual.py`).
The last of the sqrt(n) segments is not recomputed, as in `checkpoint_sequential`. `policy=` are
fxckpt's own: each value right before it is read.

The third table compares published figures of MONeT (Shah et al. 2021, their README: measured on a
V100, operator implementations chosen too) with a plan for the same memory.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tabulate import tabulate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.classifiers import WithLoss, googlenet, mobilenet_v2, vgg16
from bench.models import build
from bench.networks import UNet
from fxckpt import BudgetError, PolicyError, policies
from fxckpt.capture import capture
from fxckpt.joint import Joint
from fxckpt.planner import Planner

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """A model, its arguments, and the device to plan for."""

    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    device: str
    dtype: torch.dtype = torch.bfloat16


def tokens(batch: int, length: int) -> dict[str, Any]:
    """Arguments of a language model."""
    return {"input_ids": torch.zeros(batch, length, dtype=torch.long)}


def gpt2(dropout: float = 0.0, **options: Any) -> nn.Module:
    """GPT-2 without its head."""
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    return transformers.GPT2Model(transformers.GPT2Config(use_cache=False, **rates, **options))


def with_head(batch: int, length: int) -> tuple[nn.Module, dict[str, Any]]:
    """GPT-2 with its head, which computes the loss."""
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False, **rates))
    arguments = tokens(batch, length)
    return model, {**arguments, "labels": arguments["input_ids"]}


def bert() -> nn.Module:
    """BERT-base without its head."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertModel(transformers.BertConfig(**rates), add_pooling_layer=False)


def llama() -> nn.Module:
    """A Llama of 16 layers, without its head."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16}
    config = transformers.LlamaConfig(num_attention_heads=16, use_cache=False, **sizes)
    return transformers.LlamaModel(config)


def of_case(name: str, **sizes: int) -> tuple[nn.Module, dict[str, Any]]:
    """A case of `bench.models`."""
    case = build(name, **sizes)
    return case.model, case.batch(0)


def of_images(body: nn.Module, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier of images of 224 x 224."""
    labels = torch.zeros(batch, dtype=torch.long)
    return WithLoss(body), {"images": torch.zeros(batch, 3, 224, 224), "labels": labels}


def unet(batch: int, size: tuple[int, int]) -> tuple[nn.Module, dict[str, Any]]:
    """U-Net with the widths of the paper."""
    model = UNet(levels=4, width=64, classes=2)
    labels = torch.zeros(batch, *size, dtype=torch.long)
    return WithLoss(model), {"images": torch.zeros(batch, 3, *size), "labels": labels}


TARGETS = {
    "gpt2": Target(lambda: (gpt2(), tokens(8, 1024)), "h200"),
    "gpt2-dropout": Target(lambda: (gpt2(dropout=0.1), tokens(8, 1024)), "h200"),
    "gpt2-head": Target(lambda: with_head(8, 1024), "h200"),
    "gpt2-24-layers": Target(lambda: (gpt2(n_layer=24), tokens(8, 1024)), "h200"),
    "gpt2-48-layers": Target(lambda: (gpt2(n_layer=48), tokens(8, 1024)), "h200"),
    "bert": Target(lambda: (bert(), tokens(32, 512)), "h200"),
    "llama": Target(lambda: (llama(), tokens(4, 2048)), "h200"),
    "resnet50": Target(
        lambda: of_case("resnet", layers=50, width=64, batch=184, image=224, vocab=1000),
        "v100",
        torch.float32,
    ),
    "googlenet": Target(lambda: of_images(googlenet(), 320), "v100", torch.float32),
    "mobilenet-v2": Target(lambda: of_images(mobilenet_v2(), 272), "v100", torch.float32),
    "vgg16": Target(lambda: of_images(vgg16(), 176), "v100", torch.float32),
    "unet": Target(lambda: unet(11, (416, 608)), "v100", torch.float32),
}

# Of its README: GiB of the whole step, and per cent of time.
MONET: dict[str, tuple[tuple[float, float], ...]] = {
    "resnet50": ((10.01, 3.2), (8.01, 5.6), (6.99, 7.3), (4.99, 12.0)),
    "googlenet": ((5.0, 15.8),),
    "mobilenet-v2": ((5.0, 8.7),),
    "unet": ((5.0, 11.5),),
    "vgg16": ((5.5, 9.1),),
}


def captured(target: Target) -> tuple[Joint, int]:
    """The joint graph, and the bytes of the parameters."""
    with FakeTensorMode():
        torch.set_default_dtype(target.dtype)
        try:
            model, kwargs = target.make()
        finally:
            torch.set_default_dtype(torch.float32)
        tape = capture(model.train().forward, (), kwargs, module=model)
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        return tape.joint(tape.expected_backward()), parameters


def budgets(planner: Planner, parameters: int, fractions: Sequence[float]) -> Iterator[list[Any]]:
    """Rows of the first table."""
    eager = planner.eager_peak + parameters
    for fraction in fractions:
        start = time.process_time()
        budget = int(fraction / 100 * eager) - parameters
        try:
            plan = planner.plan(max(budget, 1))
        except BudgetError:
            yield [fraction, None, None, None, None, time.process_time() - start]
            continue
        seconds = time.process_time() - start
        peak = (plan.peak + parameters) / GIB
        bound = 100 * plan.bound / plan.step_seconds
        yield [fraction, peak, 100 * plan.overhead, bound, 100 * plan.gap, seconds]


def strategies(planner: Planner, parameters: int) -> Iterator[list[Any]]:
    """Rows of the second table: as torch runs them first, then our own policies."""
    for name, found in planner.usual().items():
        yield from _beside(planner, parameters, name, found.peak, found.seconds, found.whole)
    for name, decide in policies.NAMES.items():
        try:
            peak, seconds = planner.strategy(decide)
        except PolicyError:
            continue
        yield from _beside(planner, parameters, f"policy={name!r}", peak, seconds, seconds)


def _beside(
    planner: Planner, parameters: int, name: str, held: int, seconds: float, whole: float
) -> Iterator[list[Any]]:
    """The row of a strategy, if it recomputes anything and needs less than eager."""
    if not seconds or held >= planner.eager_peak:
        return
    plan = planner.plan(held)
    peak = 100 * (held + parameters) / (planner.eager_peak + parameters)
    step = plan.step_seconds / 100
    ratios = plan.seconds / seconds, plan.bound / seconds, plan.seconds / whole
    yield [name, peak, seconds / step, whole / step, plan.seconds / step, *ratios]


def published(name: str, planner: Planner, parameters: int) -> Iterator[list[Any]]:
    """Rows of the third table."""
    for gib, theirs in MONET.get(name, ()):
        total = int(gib * GIB)
        fraction = 100 * total / (planner.eager_peak + parameters)
        try:
            plan = planner.plan(total - parameters)
        except BudgetError:
            yield [gib, fraction, theirs, None, None]
            continue
        bound = 100 * plan.bound / plan.step_seconds
        yield [gib, fraction, theirs, 100 * plan.overhead, bound]


def section(name: str, fractions: Sequence[float]) -> str:
    """All about one model, in Markdown."""
    target = TARGETS[name]
    joint, parameters = captured(target)
    start = time.process_time()
    planner = Planner(joint, device=target.device)
    prepared = time.process_time() - start
    eager = (planner.eager_peak + parameters) / GIB
    first = tabulate(
        budgets(planner, parameters, fractions),
        ["budget %", "peak GiB", "overhead %", "bound %", "gap %", "seconds"],
        "github",
        floatfmt=("g", ".2f", ".1f", ".1f", ".1f", ".1f"),
    )
    second = tabulate(
        strategies(planner, parameters),
        [
            "strategy",
            "peak %",
            "overhead %",
            "to the end %",
            "plan at that peak %",
            "ratio",
            "bound's",
            "to the end",
        ],
        "github",
        floatfmt=("", ".0f", ".1f", ".1f", ".1f", ".2f", ".2f", ".2f"),
    )
    compared = [*published(name, planner, parameters)]
    headers = ["GiB", "of eager %", "MONeT %", "overhead %", "bound %"]
    formats = (".2f", ".0f", ".1f", ".1f", ".1f")
    third = tabulate(compared, headers, "github", floatfmt=formats) if compared else ""
    operations = len(joint.graph.nodes)
    title = (
        f"## {name}: eager peak {eager:.2f} GiB, {operations} nodes, prepared in {prepared:.1f} s"
    )
    return "\n\n".join(filter(None, [title, first, second, third]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=[*TARGETS], default=[*TARGETS])
    parser.add_argument("--budget", nargs="+", type=float, default=[90, 70, 50, 40, 30, 20])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page in Markdown")
    options = parser.parse_args(arguments)
    sections = []
    for name in options.model:
        sections.append(section(name, options.budget))
        print(sections[-1], end="\n\n", flush=True)
    if options.write:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        head = f"# Plans\n\nBy `python bench/planner.py`, {time.strftime('%Y-%m-%d')}, {versions}."
        options.write.write_text(
            "\n\n".join([head, __doc__.split("\n\n", 2)[2].strip(), *sections]) + "\n"
        )


if __name__ == "__main__":
    main()
