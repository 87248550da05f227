"""Each example under docs/examples/ shows what it says, and docs/limits.md says what is so."""

import ast
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import forget_accelerator

import fxckpt
from fxckpt.joint import MAX_CONTRIBUTIONS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[a-z]*.py"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs `main` of the example with that name, as if it were a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_example(name: str, *args: Any) -> Any:
        return importlib.import_module(name).main(*args)

    return run_example


def test_every_example_is_tested_and_listed() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f'run("{name}"' in source
        assert f"[{name}.py]({name}.py)" in listed


def test_bert_layers_are_checkpointed_without_editing_the_model(run) -> None:
    memory, equal = run("bert_layers")
    assert equal
    eager = memory.pop("eager")
    assert len(memory) == 2
    for rewritten in memory.values():
        assert rewritten.saved < eager.saved / 4
        assert rewritten.peak < eager.peak / 2


def test_batch_norm_statistics_are_updated_once(run) -> None:
    found = run("residual_batchnorm")
    for name in ("eager", "fxckpt"):
        assert found[name] == {
            "batches": 1,
            "gradients": True,
            "statistics": True,
            "evaluation": True,
        }
    assert found["torch.utils.checkpoint"]["batches"] == 2
    assert not found["torch.utils.checkpoint"]["statistics"]


def test_gpt2_peaks_lower(run) -> None:
    without, with_ = run("gpt2_peak")
    assert with_.peak < without.peak / 2
    assert with_.saved < without.saved / 4


def test_adamw_losses_are_equal(run) -> None:
    eager, ours = run("adamw_loop", 5)
    assert len(eager) == 5
    assert eager == ours
    assert eager[-1] < eager[0]


def test_amp_is_exact(run) -> None:
    assert run("amp") == {"bfloat16": True, "float16": True, "float32": True}


def test_none_and_keywords(run) -> None:
    equal, refusal = run("none_and_keywords")
    assert equal == [True, True, True]
    assert "Unexpected keyword arguments" in refusal


def test_autograd_grad(run) -> None:
    inputs, weights, refusal = run("autograd_grad")
    assert inputs
    assert weights
    assert "incompatible with .grad()" in refusal


def test_more_samples_fit(run) -> None:
    before, after = run("largest_batch")
    assert before > 1
    assert after >= 2 * before


def test_memory_grows_like_the_square_root(run) -> None:
    found = run("sqrt_memory")
    (shortest, *_, longest) = sorted(found)
    growth = longest / shortest
    eager, ours = zip(found[shortest], found[longest], strict=True)
    for what in ("saved", "peak"):
        grown_eager = getattr(eager[1], what) / getattr(eager[0], what)
        grown_ours = getattr(ours[1], what) / getattr(ours[0], what)
        assert grown_eager > 0.8 * growth
        assert grown_ours < 1.2 * growth**0.5


def test_the_library_from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    found = importlib.import_module("from_scratch").main()
    assert all(equal for _, equal in found.values())
    assert found["all"][0] == 1 > found["dots"][0]
    assert found["70%"][0] <= 0.7


def test_every_page_is_in_the_navigation_and_its_code_is_tested() -> None:
    """Blocks of Python are doctests, or include a file that is run by a test."""
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert f"{path.relative_to(ROOT / 'docs')}\n" in listed
        blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for block in blocks:
            assert block.startswith((">>> ", "--8<--")), f"{path}: {block}"


def test_trainer(run) -> None:
    without, with_, equal = run("trainer", 4)
    assert len(without) == 4 + 2  # and as many evaluations
    assert without == with_
    assert equal


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_lora(run) -> None:
    without, with_, equal = run("lora")
    assert equal
    assert with_.peak < without.peak / 2
    assert with_.saved < without.saved / 4


def test_lightning_fit(run) -> None:
    without, with_ = run("lightning_fit")
    assert len(without) == 8
    assert without == with_


def test_accelerate_loop(run) -> None:
    forget_accelerator()
    without, with_, equal = run("accelerate_loop")
    forget_accelerator()
    assert len(without) == 4
    assert without == with_
    assert equal


@pytest.mark.slow
def test_two_processes(run) -> None:
    found = run("two_processes")
    assert len(found) == 2
    for without, with_ in found:
        assert len(without) == 4
        assert without == with_


# --- docs/limits.md -----------------------------------------------------------------------------

# Caught by the runtime, which then runs forward again: nobody sees it.
INTERNAL = {"backward needs {}, which was not kept"}


def reasons() -> set[str]:
    """The first argument of each `CaptureError(...)` in the package, `{}` where it varies."""
    found = set()
    for path in (ROOT / "fxckpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("CaptureError"):
                text = template(node.args[0])
                if text is not None:
                    found.add(text)
    return found


def template(node: ast.expr) -> str | None:
    """The text of a string or f-string, `{}` where it varies; None of anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return None


def quoted() -> set[str]:
    """The messages in the tables of docs/limits.md, `{}` for what stands in angle brackets."""
    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ``? ?(.+?) ?``? \|", text, re.MULTILINE)
    return {re.sub(r"<\w+>", "{}", cell) for cell in cells}


def test_every_reason_to_fall_back_is_documented() -> None:
    missing = reasons() - INTERNAL - quoted()
    assert not missing, f"docs/limits.md lacks {sorted(missing)}"


def test_no_documented_reason_is_outdated() -> None:
    outdated = quoted() - reasons()
    assert not outdated, f"docs/limits.md quotes what the code no longer says: {sorted(outdated)}"


# The four cases of docs/limits.md that are not bit-identical: equal up to rounding, and each beside
# neighbours that are bit-identical.

FEW = range(1, MAX_CONTRIBUTIONS + 1)
USES = range(1, MAX_CONTRIBUTIONS + 3)  # of a parameter or input in one forward


class Repeated(nn.Module):
    """Applies one layer several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.times = nn.Linear(16, 16), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x.square().sum()


class Two(nn.Module):
    """Applies two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)))).square().sum()


class Branches(nn.Module):
    """Reads its input several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(times))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(layer(x)) for layer in self.layers]).sum(0)


class Shortcut(nn.Module):
    """`Branches` under a residual connection."""

    def __init__(self, times: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(16, 16), Branches(times)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return (h + self.inner(h)).square().sum()


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def rewritten(model: nn.Module) -> nn.Module:
    return fxckpt.rewrite(model, "nothing", strict=True)


def compare(
    gradients: Callable[[nn.Module], Sequence[Tensor]],
    *models: nn.Module,
    exact: bool,
    rounding: float = 1e-5,
) -> None:
    """Asserts that the gradients of both models are equal: exactly, or only up to rounding."""
    tolerance = 0.0 if exact else rounding
    eager, ours = map(gradients, models)
    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)
    same = all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
    assert same == exact, "bit-identical: docs/limits.md claims less than what is so"


@pytest.mark.parametrize("with_loss", [False, True])
def test_second_order_gradients(with_loss: bool) -> None:
    x = torch.randn(8, 16)

    def gradients(model: nn.Module) -> Sequence[Tensor]:
        loss, parameters = model(x), list(model.parameters())
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        total = penalty + loss if with_loss else penalty
        return [*first, *torch.autograd.grad(total, parameters)]

    model = Two()
    first = len(list(model.parameters()))
    compare(lambda m: gradients(m)[:first], model, rewritten(model), exact=True)
    compare(gradients, model, rewritten(model), exact=not with_loss)


@pytest.mark.parametrize("times", USES)
@pytest.mark.parametrize("together", [False, True])
def test_several_forwards(times: int, together: bool) -> None:
    inputs = torch.randn(3, 8, 16)

    def gradients(model: nn.Module) -> Sequence[Tensor]:
        model.zero_grad()
        if together:
            torch.stack([model(x) for x in inputs]).sum().backward()
        else:
            for x in inputs:
                model(x).backward()
        return [p.grad for p in model.parameters()]

    model = Repeated(times)
    compare(gradients, model, rewritten(model), exact=times in FEW or not together)


@pytest.mark.parametrize("times", USES)
def test_penalty_on_parameters(times: int) -> None:
    x = torch.randn(8, 16)

    def gradients(model: nn.Module) -> Sequence[Tensor]:
        parameters = list(model.parameters())
        loss = model(x) + torch.stack([p.square().sum() for p in parameters]).sum()
        return torch.autograd.grad(loss, parameters)

    model = Repeated(times)
    compare(gradients, model, rewritten(model), exact=times in FEW)


@pytest.mark.parametrize("one_region", [False, True])
def test_several_forwards_under_autocast(one_region: bool) -> None:
    inputs = torch.randn(3, 8, 16)

    def losses(model: nn.Module) -> list[Tensor]:
        if one_region:
            with autocast():
                return [model(x).float() for x in inputs]
        found = []
        for x in inputs:
            with autocast():
                found.append(model(x).float())
        return found

    def gradients(model: nn.Module) -> Sequence[Tensor]:
        model.zero_grad()
        torch.stack(losses(model)).sum().backward()
        return [p.grad for p in model.parameters()]

    model = Two()
    compare(gradients, model, rewritten(model), exact=not one_region, rounding=0.05)


@pytest.mark.parametrize("times", USES)
@pytest.mark.parametrize("alone", [False, True])
def test_submodule_that_reads_its_input_several_times(alone: bool, times: int) -> None:
    x = torch.randn(8, 16)
    model, other = Shortcut(times), Shortcut(times)
    if alone:
        fxckpt.rewrite_(other.inner, "nothing", strict=True)
    else:
        other = rewritten(other)

    def gradients(model: nn.Module) -> Sequence[Tensor]:
        return torch.autograd.grad(model(x), list(model.parameters()))

    compare(gradients, model, other, exact=times in FEW or not alone)


class Viewed(nn.Module):
    """Returns a tensor, or a view of it, and what it computes from that."""

    def __init__(self, view: bool, often: bool, of_input: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)
        self.view, self.often, self.of_input = view, often, of_input

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x if self.of_input else self.layer(x)
        seen = hidden.view(8, 4, 4) if self.view else hidden
        inner = seen.sin() * seen.tanh() + seen if self.often else seen
        return seen, inner.view(8, 16).exp() * (self.layer(x) if self.of_input else 1)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("often", [False, True])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("of_input", [False, True])
def test_view_in_the_result(of_input: bool, view: bool, often: bool, outside: bool) -> None:
    values = torch.randn(8, 16)

    def gradients(model: nn.Module) -> Sequence[Tensor]:
        x = values.clone().requires_grad_()
        seen, out = model(x)
        loss = out.square().sum() * 0.7
        if outside:
            loss = loss + seen.square().sum() * 0.3
        return torch.autograd.grad(loss, [x, *model.parameters()])

    model = Viewed(view, often, of_input)
    several = often or of_input  # the input is read without the view, too
    compare(gradients, model, rewritten(model), exact=not (view and several and outside))
