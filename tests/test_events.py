"""Random sequences of events, applied to an eager and a rewritten model in lockstep."""

import contextlib
import os
import warnings
from typing import Any

import pytest
import torch
from helpers import content, describe, seed_all, total
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import fxckpt

EXAMPLES = {"dev": 20, "ci": 40, "thorough": 300}[os.environ.get("HYPOTHESIS_PROFILE", "dev")]
MODULES = ("0", "1", "2", "3.1", "4")
switches = st.booleans()


class Tail(nn.Module):
    """Reads what nobody registered: a tensor, a list, an object."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.ones(width))
        self.table, self.scales = torch.linspace(0.5, 1.5, width), [1.0, {"inner": 2.0}]

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = self.linear(x) * self.table.to(x.dtype) * self.scales[1]["inner"]
        return x * (1 if self.mask is None else self.mask.to(x.dtype)) + self.scales[0]


def build(width: int = 4) -> nn.Sequential:
    """One layer of each kind whose state matters."""
    inner = nn.Sequential(nn.GELU(), nn.Linear(width, width))
    return nn.Sequential(
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.4), inner, Tail(width)
    )


class Twin:
    """A model with its optimizer, its random state and the hooks that were added."""

    def __init__(self, *, rewritten: bool, policy: str) -> None:
        seed_all(0)
        self.model = build()
        if rewritten:
            fxckpt.rewrite_(self.model, policy)
        self.hooks: list[Any] = []
        self.random_state = torch.get_rng_state()
        self.restart()

    def restart(self) -> None:
        """A new optimizer: parameters were replaced."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    @contextlib.contextmanager
    def turn(self) -> Any:
        """The random generator is the one that this twin left."""
        torch.set_rng_state(self.random_state)
        yield self.model
        self.random_state = torch.get_rng_state()

    def seen(self) -> dict[str, Any]:
        """Everything that can be seen of the model."""
        model = self.model
        found = {f"gradient of {n}": content(p.grad) for n, p in model.named_parameters()}
        found |= {n: describe(p) for n, p in model.named_parameters()}
        found |= {n: describe(b) for n, b in model.named_buffers()}
        return found | {"random state": self.random_state.numpy().tobytes()}


class Events(RuleBasedStateMachine):
    """Whatever happens to a model, the rewritten one does the same."""

    @initialize(policy=st.sampled_from(["nothing", "everything", "dots"]))
    def start(self, policy: str) -> None:
        self.caught = contextlib.ExitStack()
        self.caught.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # falling back; backward hooks without inputs to hook
        self.twins = [Twin(rewritten=r, policy=policy) for r in (False, True)]
        self.rows, self.autocast, self.number = 3, False, 0

    def teardown(self) -> None:
        self.caught.close()

    @property
    def dtype(self) -> torch.dtype:
        return self.twins[0].model[0].weight.dtype

    def batch(self) -> Tensor:
        return (
            torch.linspace(-1, 1 + self.number, self.rows * 4)
            .view(self.rows, 4)
            .cos()
            .to(self.dtype)
        )

    def each(self, change: Any) -> None:
        """The same change to both, and the same answer."""
        answers = []
        for twin in self.twins:
            with twin.turn() as model:
                try:
                    answers.append(change(model))
                except RuntimeError as error:
                    answers.append(str(error).split("\n")[0][:40])
        assert answers[0] == answers[1]

    @invariant()
    def same(self) -> None:
        if hasattr(self, "twins"):
            self.accumulate(wants=bool(self.number % 2), count=1)
            eager, ours = (twin.seen() for twin in self.twins)
            assert eager.keys() == ours.keys()
            for name in eager:
                assert eager[name] == ours[name], name

    # -- running

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return model(x)

    @rule(wants=switches, count=st.integers(2, 3))
    def accumulate(self, wants: bool, count: int) -> None:
        self.number += 1

        def run(model: nn.Module) -> Any:
            found = []
            for _ in range(count):
                x = self.batch().requires_grad_(wants)
                out = self.forward(model, x)
                if out.requires_grad:
                    total(out).backward()
                found += [describe(out), content(x.grad)]
            return found

        self.each(run)

    @rule()
    def two_forwards_one_backward(self) -> None:
        def run(model: nn.Module) -> Any:
            outs = [self.forward(model, self.batch()) for _ in range(2)]
            if outs[0].requires_grad:
                total(outs).backward()
            return [describe(o) for o in outs]

        if not self.autocast:
            self.each(run)

    @rule()
    def no_grad(self) -> None:
        def run(model: nn.Module) -> Any:
            with torch.no_grad():
                return describe(self.forward(model, self.batch()))

        self.each(run)

    @rule(to_none=switches)
    def zero_grad(self, to_none: bool) -> None:
        self.each(lambda model: model.zero_grad(set_to_none=to_none))

    @rule(to_none=switches)
    def optimizer_step(self, to_none: bool) -> None:
        for twin in self.twins:
            twin.optimizer.step()
            twin.optimizer.zero_grad(set_to_none=to_none)

    # -- modes

    @rule(rows=st.integers(2, 4))
    def other_batch_size(self, rows: int) -> None:
        self.rows = rows

    @rule()
    def other_autocast(self) -> None:
        self.autocast = not self.autocast

    @rule(path=st.sampled_from(("", *MODULES)), mode=switches)
    def train(self, path: str, mode: bool) -> None:
        self.each(lambda model: model.get_submodule(path).train(mode) and None)

    @rule(path=st.sampled_from(MODULES), which=st.integers(0, 1), wants=switches)
    def freeze(self, path: str, which: int, wants: bool) -> None:
        def change(model: nn.Module) -> None:
            for p in list(model.get_submodule(path).parameters(recurse=False))[which:]:
                p.requires_grad_(wants)

        self.each(change)

    @rule(p=st.sampled_from((0.0, 0.2, 0.4)))
    def dropout(self, p: float) -> None:
        self.each(lambda model: setattr(model[2], "p", p))

    @rule(dtype=st.sampled_from((torch.float32, torch.float64)))
    def cast(self, dtype: torch.dtype) -> None:
        self.each(lambda model: model.to(dtype) and None)
        for twin in self.twins:
            twin.restart()

    # -- structure and contents

    @rule(assign=switches, factor=st.sampled_from((0.5, 2.0)))
    def load_state(self, assign: bool, factor: float) -> None:
        def change(model: nn.Module) -> None:
            state = {
                k: v * factor if v.is_floating_point() else v.clone()
                for k, v in model.state_dict().items()
            }
            model.load_state_dict(state, assign=assign)

        self.each(change)
        for twin in self.twins:
            twin.restart()

    @rule(
        path=st.sampled_from(("", "2", "3.0", "4")),
        kind=st.sampled_from(("output", "input", "gradient")),
    )
    def add_hook(self, path: str, kind: str) -> None:
        for twin in self.twins:
            module = twin.model.get_submodule(path)
            if kind == "output":
                handle = module.register_forward_hook(lambda m, args, out: out * 1.5)
            elif kind == "input":
                handle = module.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
            else:
                handle = module.register_full_backward_hook(lambda *_: None)
            twin.hooks.append(handle)

    @precondition(lambda self: self.twins[0].hooks)
    @rule()
    def remove_hook(self) -> None:
        for twin in self.twins:
            twin.hooks.pop().remove()

    @rule(kind=st.sampled_from((nn.Tanh, nn.GELU, nn.Identity)))
    def replace_submodule(self, kind: type[nn.Module]) -> None:
        self.each(lambda model: model[3].__setitem__(0, kind()))

    @rule()
    def replace_parameter(self) -> None:
        self.each(
            lambda model: setattr(
                model[0], "weight", nn.Parameter(torch.randn(4, 4).to(self.dtype))
            )
        )
        for twin in self.twins:
            twin.restart()

    @rule(tied=switches)
    def tie(self, tied: bool) -> None:
        def change(model: nn.Module) -> None:
            first = model[0].weight
            model[3][1].weight = first if tied else nn.Parameter(first.detach().clone())

        self.each(change)
        for twin in self.twins:
            twin.restart()

    @rule(value=st.sampled_from((0.5, 2.0)), in_place=switches)
    def change_table(self, value: float, in_place: bool) -> None:
        def change(model: nn.Module) -> None:
            if in_place:
                model[4].table.mul_(value)
            else:
                model[4].table = torch.full((4,), value)

        self.each(change)

    @rule(value=st.sampled_from((0.0, 1.0, 2.0)))
    def number_in_a_list(self, value: float) -> None:
        self.each(lambda model: model[4].scales.__setitem__(0, value))

    @rule(value=st.sampled_from((1.0, 2.0)))
    def number_in_a_dictionary(self, value: float) -> None:
        self.each(lambda model: model[4].scales[1].update(inner=value))

    @rule(value=st.sampled_from((1.0, 2.0)))
    def other_list(self, value: float) -> None:
        self.each(lambda model: setattr(model[4], "scales", [value, {"inner": 3.0}]))

    @rule(value=st.sampled_from((None, 0.5, 2.0)))
    def other_buffer(self, value: float | None) -> None:
        mask = None if value is None else torch.full((4,), value)
        self.each(lambda model: setattr(model[4], "mask", None if mask is None else mask.clone()))


Events.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=25, deadline=None)
TestEvents = pytest.mark.slow(Events.TestCase)
