"""Modules, parameters and buffers come, go and change between two calls."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from helpers import chain
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from traps import DTYPE, STATE, all_of, function, rows
from traps.state import changes


def net() -> nn.Module:
    """Layers whose numbers matter."""
    inner = nn.Sequential(nn.GELU(), nn.Linear(4, 4))
    return nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), inner, nn.LayerNorm(4)
    )


def pair() -> nn.Module:
    """Two equal layers, which may be tied."""
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), copy.deepcopy(layer))


class Containers(nn.Module):
    """Every container of modules and parameters, and names that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.scales = nn.ParameterList([torch.ones(4), torch.ones(4)])
        self.table = nn.ParameterDict({"a": torch.ones(4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        for name, layer in self.named.items():
            x = layer(x) * len(name)
        for scale in self.scales:
            x = x * scale
        for name, scale in self.table.items():
            x = x * scale * len(name)
        return x


class Optional(nn.Module):
    """Parameters and buffers that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.register_buffer("mask", None)
        self.register_buffer("shift", torch.ones(4))
        self.register_parameter("gain", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        for factor in (self.gain, self.mask):
            y = y if factor is None else y * factor
        return y if self.shift is None else y + self.shift


def put(name: str, value: Callable[[], Any]) -> Callable[[nn.Module], None]:
    """Another value of an attribute of a submodule."""
    path, _, key = name.rpartition(".")
    return lambda m: setattr(m.get_submodule(path), key, value())


def number(name: str, value: Any) -> Callable[[nn.Module], None]:
    """Another number as an attribute of a submodule."""
    return put(name, lambda: value)


def parameter(shape: tuple[int, ...] = (4, 4)) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.3))


def rename(m: Any) -> None:
    """The same children by other names, in the same dictionary."""
    children = list(m.named.values())
    m.named.clear()
    m.named.update({"aaa": children[0], "b": children[1]})


def other_dtype(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """Parameters and inputs of another dtype."""

    def change(m: nn.Module) -> None:
        m.to(dtype).register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))

    return change


def scaled(m: nn.Module) -> dict[str, Tensor]:
    """Another state."""
    return {k: v * 2 if v.is_floating_point() else v.clone() for k, v in m.state_dict().items()}


def tie(m: Any) -> None:
    m[2].weight = m[0].weight


def tied() -> nn.Module:
    """Two layers with one weight."""
    model = pair()
    tie(model)
    return model


def untie(m: Any) -> None:
    m[2].weight = nn.Parameter(m[0].weight.detach().clone())


def freeze(path: str = "", wants: bool = False) -> Callable[[nn.Module], None]:
    """Switches the gradients of a parameter, or of all in a submodule, off or on."""

    def change(m: nn.Module) -> None:
        for name, p in m.named_parameters():
            if name == path or path == "" or name.startswith(f"{path}."):
                p.requires_grad_(wants)

    return change


def partly_frozen() -> nn.Module:
    """Some parameters need no gradient."""
    model = net()
    freeze("0")(model)
    freeze("3")(model)
    return model


TRAPS = [
    changes("mode of a submodule", net, lambda m: m[2].eval(), lambda m: m[1].eval(),
            lambda m: m.train()),
    changes("p", net, number("2.p", 0.2), number("2.p", 0.0), number("2.p", 0.4)),
    changes("eps", net, number("4.eps", 0.1), number("1.eps", 0.1)),
    changes("momentum", net, number("1.momentum", 0.5), number("1.momentum", None)),
    changes("approximation", net, number("3.0.approximate", "tanh")),
    changes("statistics off", net, number("1.track_running_stats", False)),
    changes("no statistics", net,
            lambda m: m[1].__init__(4, track_running_stats=False)),
    changes("submodule replaced", net, put("3.0", nn.Tanh), put("2", nn.Identity)),
    changes("submodule of other structure", net, put("3", lambda: nn.Linear(4, 4)),
            put("3", lambda: chain(1, 4))),
    changes("forward of a submodule", net, put("3.0.forward", lambda: lambda x: x * 2),
            lambda m: m[3][0].__dict__.pop("forward")),
    changes("class of a submodule", net, number("3.0.__class__", nn.Tanh)),
    changes("sequential", net, lambda m: m.append(nn.Tanh()), lambda m: m.__delitem__(0),
            lambda m: m.insert(1, nn.Linear(4, 4))),
    changes("module list", Containers, lambda m: m.layers.append(nn.Linear(4, 4)),
            lambda m: m.layers.__delitem__(0), lambda m: m.layers.append(m.layers[0])),
    changes("order of a module list", Containers,
            put("layers", lambda: nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])),
            lambda m: m.layers.__init__(list(m.layers)[::-1])),
    changes("names in a module dictionary", Containers, rename),
    changes("parameter list", Containers, lambda m: m.scales.append(torch.ones(4) * 2),
            lambda m: m.scales.__setitem__(0, parameter((4,)))),
    changes("names in a parameter dictionary", Containers,
            lambda m: m.table.__setitem__("bbb", m.table.pop("a"))),
    changes("parameter replaced", net, put("0.weight", parameter), guard=None),
    changes("data of a parameter", net, lambda m: setattr(m[0].weight, "data", rows(4)),
            guard=None),
    changes("strides of a parameter", function(lambda m, x: x @ m.weight * m.weight.stride(0)),
        lambda m: setattr(m.weight, "data", rows(4).t())),
    changes("parameters swapped", net,
            lambda m: torch.utils.swap_tensors(m[0].weight, parameter()), guard=None),
    changes("bias None", net, number("0.bias", None)),
    changes("None, then a bias", Optional, put("layer.bias", lambda: parameter((4,))),
            number("layer.bias", None)),
    changes("None, then a parameter", Optional, put("gain", lambda: parameter((4,))),
            number("gain", None), put("gain", lambda: parameter((4,)))),
    changes("None, then a buffer", Optional, put("mask", lambda: torch.ones(4) * 3),
            number("mask", None), put("mask", lambda: torch.ones(4) * 4)),
    changes("buffer, then None", Optional, number("shift", None),
            put("shift", lambda: torch.ones(4) * 4)),
    changes("buffer replaced", Optional, put("shift", lambda: torch.ones(4) * 4), guard=None),
    changes("buffer with a gradient", Optional, lambda m: m.shift.requires_grad_(),
            lambda m: m.shift.requires_grad_(False), guard=None),
    changes("buffer deleted", Optional, lambda m: (delattr(m, "shift"), setattr(m, "shift", None))),
    changes("one parameter thawed", partly_frozen, freeze("0.weight", True), freeze("0.weight")),
    changes("thawed", partly_frozen, freeze("3", True), freeze("0", True), freeze("3")),
    changes("all frozen", net, freeze(), freeze("", True), graph=4, guard=None),
    changes("double", net, other_dtype(torch.float64), guard=all_of(STATE, DTYPE)),
    changes("bfloat16", net, other_dtype(torch.bfloat16), guard=all_of(STATE, DTYPE)),
    changes("loaded", net, lambda m: m.load_state_dict(scaled(m)), guard=None),
    changes("assigned", net, *[lambda m: m.load_state_dict(scaled(m), assign=True)] * 2,
            guard=None),
    changes("parametrized", net, lambda m: parametrizations.weight_norm(m[0]),
            lambda m: parametrize.remove_parametrizations(m[0], "weight")),
    changes("spectral norm", net, lambda m: parametrizations.spectral_norm(m[0])),
    changes("weight norm by hooks", net, lambda m: nn.utils.weight_norm(m[0]),
            lambda m: nn.utils.remove_weight_norm(m[0])),
    changes("pruned", net, *[lambda m: prune.l1_unstructured(m[0], "weight", 4)] * 2,
            lambda m: m[0].weight_mask.fill_(1), lambda m: prune.remove(m[0], "weight")),
    changes("tied", tied, untie, tie, lambda m: setattr(m[0], "weight", parameter())),
]  # fmt: skip
