"""`checkpoint`, `name` and `saved_values`: functions that keep less for their backward."""

import functools
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Counter, all_dispatched
from torch import Tensor, nn

import fxckpt
from fxckpt import FallbackWarning, PolicyError, checkpoint, policies, saved_values
from fxckpt.functional import module_of

WIDTH = 6


def wide(seed: int = 0, *shape: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(*(shape or (3, WIDTH)))


def step(fn: Callable[..., Any], *args: Any, wanted: Any = (), **kwargs: Any) -> list[Tensor]:
    """Result and gradients, from a fixed seed."""
    torch.manual_seed(1)
    args = tuple(a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in args)
    out = fn(*args, **kwargs)
    inputs = [*(a for a in args if isinstance(a, Tensor)), *wanted]
    grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None), torch.get_rng_state()]


def assert_same_step(fn: Any, other: Any, *args: Any, **kwargs: Any) -> None:
    """Twice: the first call captures, the second one compares with the capture."""
    for _ in range(3):
        expected, found = step(fn, *args, **kwargs), step(other, *args, **kwargs)
        assert len(expected) == len(found)
        assert all(map(torch.equal, expected, found))


# --- functions ------------------------------------------------------------------------------------


def documented(x: Tensor, scale: float = 2.0, *, shift: dict[str, Tensor] | None = None) -> Tensor:
    """Says what it does."""
    y = (x * scale).sin().exp()
    return y if shift is None else y + shift["by"]


def test_keeps_name_docstring_and_signature() -> None:
    lean = checkpoint(documented)
    assert lean.__name__ == "documented"
    assert lean.__doc__ == documented.__doc__
    assert lean.__module__ == documented.__module__
    assert inspect.signature(lean) == inspect.signature(documented)


def test_arguments_of_all_kinds() -> None:
    lean = checkpoint(documented, strict=True)
    assert_same_step(documented, lean, wide())
    assert_same_step(documented, lean, wide(), 3.0)
    assert_same_step(documented, lean, wide(), shift={"by": wide(2)})
    assert_same_step(documented, lean, wide(3, 5, WIDTH), scale=0.5)


def test_as_decorator() -> None:
    @checkpoint
    def plain(x: Tensor) -> Tensor:
        return x.sin().exp()

    @checkpoint(policy="everything", strict=True)
    def with_options(x: Tensor) -> Tensor:
        return x.sin().exp()

    assert_same_step(plain, with_options, wide())
    x = wide().requires_grad_()
    assert len(saved_values(plain, x)) == 1
    assert len(saved_values(with_options, x)) > 1


def test_nested_containers() -> None:
    def fn(x: Tensor, rest: dict[str, Any]) -> dict[str, Any]:
        return {"a": (x.sin() * rest["w"][0], [rest["w"][1].exp()]), "b": rest["k"], "c": None}

    x, rest = wide().requires_grad_(), {"w": [wide(1).requires_grad_(), wide(2)], "k": "static"}
    out, lean = fn(x, rest), checkpoint(fn, strict=True)(x, rest)
    assert out.keys() == lean.keys()
    assert (lean["b"], lean["c"]) == ("static", None)
    assert torch.equal(out["a"][0], lean["a"][0])
    assert torch.equal(out["a"][1][0], lean["a"][1][0])


def test_recomputes() -> None:
    lean = checkpoint(lambda x: x.sin().exp().tanh())
    x = wide().requires_grad_()
    for _ in range(2):
        with all_dispatched(Counter()) as counter:
            lean(x).sum().backward()
    assert counter["sin"] == counter["exp"] == 2


PROGRAM = """
import torch
from fxckpt import checkpoint

@checkpoint
def plain(x: torch.Tensor, k: int = 1) -> torch.Tensor: return x

@checkpoint(policy="dots", decompose=True)
def with_options(x: torch.Tensor, *, k: str) -> list[torch.Tensor]: return [x]

reveal_type(plain)
reveal_type(with_options)
reveal_type(checkpoint(plain, budget="1GiB"))
checkpoint(plain, budget=[])
checkpoint(plain, polcy="dots")
plain("x")
"""


@pytest.mark.slow
def test_types(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[1]
    options = [f"--config-file={root / 'pyproject.toml'}", f"--cache-dir={root / '.mypy_cache'}"]
    lines = api.run([*options, str(program)])[0].replace("builtins.", "").splitlines()
    revealed = [line.split("Revealed type is ")[1] for line in lines if "Revealed" in line]
    assert revealed == [
        '"def (x: torch._tensor.Tensor, k: int =) -> torch._tensor.Tensor"',
        '"def (x: torch._tensor.Tensor, *, k: str) -> list[torch._tensor.Tensor]"',
        '"def (x: torch._tensor.Tensor, k: int =) -> torch._tensor.Tensor"',
    ]
    wrong = {int(match[1]) for line in lines if (match := re.search(r":(\d+): error:", line))}
    expected = PROGRAM.splitlines()[-3:]
    assert [PROGRAM.splitlines()[number - 1] for number in sorted(wrong)] == expected


# --- what functions read from around them ---------------------------------------------------------


def test_tensors_from_around() -> None:
    weight = wide(1, WIDTH, WIDTH).requires_grad_()

    def fn(x: Tensor) -> Tensor:
        return (x @ weight).sin().exp()

    lean = checkpoint(fn, strict=True)
    assert_same_step(fn, lean, wide(), wanted=[weight])
    weight = wide(2, WIDTH, WIDTH).requires_grad_()  # another tensor
    assert_same_step(fn, lean, wide(), wanted=[weight])
    with torch.no_grad():
        weight.mul_(2)
    assert_same_step(fn, lean, wide(), wanted=[weight])


def test_numbers_from_around() -> None:
    factor = 2.0

    def fn(x: Tensor) -> Tensor:
        return (x * factor).sin().exp()

    lean = checkpoint(fn, strict=True)
    assert_same_step(fn, lean, wide())
    factor = 3.0
    assert_same_step(fn, lean, wide())


def test_modules_from_around() -> None:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh())

    def fn(x: Tensor) -> Tensor:
        return layer(layer(x))

    lean = checkpoint(fn, strict=True)
    assert_same_step(fn, lean, wide(), wanted=[*layer.parameters()])
    layer.eval()
    assert_same_step(fn, lean, wide(), wanted=[*layer.parameters()])
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())  # another module
    assert_same_step(fn, lean, wide(), wanted=[*layer.parameters()])


GLOBAL = nn.Linear(WIDTH, WIDTH)


def test_global_modules_and_methods() -> None:
    class Holder:
        def __init__(self) -> None:
            self.layers = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]

        def run(self, x: Tensor, power: int) -> Tensor:
            return (self.layers[1](GLOBAL(self.layers[0](x))) ** power).sin()

    holder = Holder()
    wanted = [*GLOBAL.parameters(), *holder.layers[0].parameters()]
    assert_same_step(holder.run, checkpoint(holder.run, strict=True), wide(), 2, wanted=wanted)
    partial = functools.partial(holder.run, power=3)
    assert_same_step(partial, checkpoint(partial, strict=True), wide(), wanted=wanted)


def test_data_is_not_searched_for_modules_at_each_call() -> None:
    class Data(list):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Data.reads += 1
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            for item in super().__iter__():
                Data.reads += 1
                yield item

    holder = SimpleNamespace(data=Data([1.0] * 5000), layer=nn.Linear(WIDTH, WIDTH))
    called = module_of(checkpoint(lambda x: holder.layer(x)))
    Data.reads = 0
    called.find_modules()
    assert Data.reads <= 1
    assert "holder_layer" in dict(called.named_modules())


def test_module_as_function() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.BatchNorm1d(WIDTH))
    lean = checkpoint(model, strict=True)
    x = wide(0, 8, WIDTH)
    found = []
    for fn in (model, lean):
        model[2].reset_running_stats()
        found.append([*step(fn, x, wanted=[*model.parameters()]), model[2].running_mean.clone()])
    assert all(map(torch.equal, *found))


def test_selectors_by_the_names_of_variables() -> None:
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def fn(x: Tensor) -> Tensor:
        return second(first(x).sin()).sin()

    kept = saved_values(checkpoint(fn, save="first"), wide().requires_grad_())
    outputs = [value.origin for value in kept if value.origin.startswith("output")]
    assert len(outputs) == 1
    assert outputs[0].endswith("in first")


# --- what cannot be -------------------------------------------------------------------------------


def test_falls_back_with_a_warning() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * x.detach().sum().item()

    lean = checkpoint(fn)
    with pytest.warns(FallbackWarning, match="runs eagerly"):
        assert_same_step(fn, lean, wide())
    with pytest.raises(fxckpt.CaptureError, match="_local_scalar_dense"):
        checkpoint(fn, strict=True)(wide().requires_grad_())


def test_wrong_arguments() -> None:
    with pytest.raises(
        PolicyError, match=r"checkpoint\(fn, \.\.\.\): expected a function, got str"
    ):
        checkpoint("dots")
    with pytest.raises(PolicyError, match="unknown policy"):
        checkpoint(documented, policy="dotz")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        checkpoint(documented, polcy="dots")
    with pytest.raises(PolicyError, match="expected a string, got int"):
        fxckpt.name(wide(), 3)


def test_exceptions_of_the_function_come_out() -> None:
    def fn(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        checkpoint(fn)(wide().requires_grad_())


# --- names ----------------------------------------------------------------------------------------


def test_name_is_an_identity() -> None:
    x = {"a": wide(), "b": 3}
    assert fxckpt.name(x, "x") is x


def named(x: Tensor) -> Tensor:
    y = fxckpt.name(x.sin(), "first")
    y = fxckpt.name((y * y).t(), "second")
    return fxckpt.name(y * y, "third").cos()


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        (policies.save_only_these_names("first"), {"first"}),
        (policies.save_only_these_names("second", "third"), {"second", "third"}),
        (policies.save_only_these_names(), set()),
        (policies.save_any_names_but_these("first"), {"second", "third"}),
        (policies.everything_saveable, {"first", "second", "third"}),
    ],
)
def test_names_for_policies(policy: Any, names: set[str]) -> None:
    lean = checkpoint(named, policy=policy, strict=True)
    kept = {value.origin for value in saved_values(lean, wide().requires_grad_())}
    assert {name for name in ("first", "second", "third") if f"named {name!r}" in kept} == names
    assert_same_step(named, lean, wide())


# --- saved values ---------------------------------------------------------------------------------


def test_saved_values_say_where_they_come_from() -> None:
    layer = nn.Linear(WIDTH, WIDTH)

    def fn(x: dict[str, list[Tensor]]) -> Tensor:
        return torch.dropout(layer(x["in"][0]).sin(), 0.5, True) * 2

    x = {"in": [wide(0, 64, 1024, WIDTH).requires_grad_()]}
    kept = saved_values(checkpoint(fn, policy="dots"), x)
    origins = [value.origin for value in kept]
    assert origins[:2] == ["parameter 'layer.weight'", "argument x['in'][0]"]
    assert any(o.startswith("output of aten.addmm at test_functional.py:") for o in origins)
    assert any(
        o.startswith("state of the random generator before aten.bernoulli_") for o in origins
    )
    assert all(value.size > 0 for value in kept)
    by_origin = {value.origin: value for value in kept}
    assert by_origin["argument x['in'][0]"].shape == (64, 1024, WIDTH)


def test_saved_values_of_what_is_not_checkpointed() -> None:
    x = wide().requires_grad_()
    assert [v.origin for v in saved_values(torch.sin, x)] == ["argument args[0]"]
    assert len(saved_values(lambda x: x.sin().exp(), x)) == 2
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    everything = saved_values(model, wide())
    nothing = saved_values(fxckpt.rewrite(model, "nothing"), wide())
    assert "output of aten.tanh" in " ".join(v.origin for v in everything)
    assert "output" not in " ".join(v.origin for v in nothing)
    assert saved_values(lambda x: x.sin(), wide()) == []
    with pytest.raises(fxckpt.FxckptError, match="in evaluation mode"):
        saved_values(model.eval(), wide())


def test_print_saved_values(capsys: pytest.CaptureFixture[str]) -> None:
    fxckpt.print_saved_values(checkpoint(named), wide().requires_grad_())
    assert capsys.readouterr().out == "float32[3,6] (72 bytes) argument x\n"


# --- against JAX ----------------------------------------------------------------------------------


def _mlp(lib: Any, name: Any) -> Any:
    def mlp(w1: Any, w2: Any, w3: Any, x: Any) -> Any:
        h = name(lib.sin(lib.matmul(x, w1)), "a")
        h = name(lib.sin(lib.matmul(h, w2)), "b")
        return lib.sin(lib.matmul(h, w3))

    return mlp, [(4, 6), (6, 7), (7, 3), (5, 4)]


def _attention(lib: Any, name: Any) -> Any:
    def attention(q: Any, k: Any, v: Any, w: Any) -> Any:
        scores = name(lib.matmul(q, lib.swapaxes(k, 1, 2)), "a")
        mixed = lib.matmul(lib.exp(scores), v)
        return lib.sin(lib.matmul(name(lib.sin(mixed), "b"), w))

    return attention, [(2, 5, 4), (2, 7, 4), (2, 7, 3), (3, 6)]


def _rnn(lib: Any, name: Any) -> Any:
    def rnn(x: Any, w: Any, u: Any) -> Any:
        h = lib.matmul(x[0], w)
        for t in range(1, 3):
            h = name(lib.sin(lib.matmul(x[t], w) + lib.matmul(h, u)), "a" if t == 1 else "b")
        return lib.sin(h)

    return rnn, [(3, 2, 4), (4, 6), (6, 6)]


POLICIES: dict[str, Callable[[Any], Any]] = {
    "everything": lambda p: p.everything_saveable,
    "nothing": lambda p: p.nothing_saveable,
    "dots": lambda p: p.dots_saveable,
    "dots without batch": lambda p: p.dots_with_no_batch_dims_saveable,
    "a": lambda p: p.save_only_these_names("a"),
    "a and b": lambda p: p.save_only_these_names("a", "b"),
    "names but a": lambda p: p.save_any_names_but_these("a"),
    "both": lambda p: p.save_from_both_policies(
        p.dots_with_no_batch_dims_saveable, p.save_only_these_names("b")
    ),
}


@pytest.mark.parametrize(
    ("program", "policy"),
    [
        (program, policy)
        for program in (_mlp, _attention, _rnn)
        for policy in POLICIES
        # What JAX slices or transposes is a value to save; here it is a view of an argument.
        if program is _mlp or policy != "everything"
    ],
)
def test_residuals_correspond_to_those_of_jax(program: Any, policy: str) -> None:
    """As many, of as many elements, from arguments, names and operations."""
    jax = pytest.importorskip("jax")
    from jax._src.ad_checkpoint import checkpoint_name, saved_residuals

    theirs, shapes = program(jax.numpy, checkpoint_name)
    ours, _ = program(torch, fxckpt.name)
    theirs = jax.checkpoint(theirs, policy=POLICIES[policy](jax.checkpoint_policies))
    ours = checkpoint(ours, policy=POLICIES[policy](policies), strict=True)
    expected = sorted(
        (_kind(origin), math.prod(aval.shape))
        for aval, origin in saved_residuals(theirs, *map(jax.numpy.ones, shapes))
    )
    arguments = [torch.ones(shape, requires_grad=True) for shape in shapes]
    found = sorted((_kind(v.origin), math.prod(v.shape)) for v in saved_values(ours, *arguments))
    assert found == expected


def _kind(origin: str) -> str:
    return next(kind for kind in ("argument", "named", "output") if kind in origin)
