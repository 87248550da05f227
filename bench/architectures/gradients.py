"""Gradients of the model's own making: custom functions, and derivatives inside of forward."""

import torch
from torch import Tensor, nn

from bench.architectures.case import Architecture
from bench.architectures.tables import Composed, architectures_of, batches, normal, uniform, weight


class Reversal(torch.autograd.Function):
    """The identity whose gradient is turned around (Ganin and Lempitsky 2014)."""

    @staticmethod
    def forward(ctx: object, x: Tensor, strength: float) -> Tensor:
        """The input."""
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        """Turns the gradient."""
        return -ctx.strength * grad, None


class Swish(torch.autograd.Function):
    """Recomputes its inside in backward, to save memory."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """x times its sigmoid."""
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        """By hand."""
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return grad * gate * (1 + x * (1 - gate))


class Reversible(torch.autograd.Function):
    """Two streams whose inputs are computed from their outputs in backward (Gomez et al. 2017)."""

    @staticmethod
    def forward(ctx: object, a: Tensor, b: Tensor, f: nn.Module, g: nn.Module, *_: Tensor) -> tuple:
        """Couples without keeping the inputs."""
        with torch.no_grad():
            a = a + f(b)
            b = b + g(a)
        ctx.f, ctx.g = f, g
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    def backward(ctx: object, da: Tensor, db: Tensor) -> tuple:
        """Undoes the coupling, then differentiates it."""
        a, b = ctx.saved_tensors
        weights = [*ctx.f.parameters(), *ctx.g.parameters()]
        with torch.no_grad():
            b = b - ctx.g(a)
            a = a - ctx.f(b)
        with torch.enable_grad():
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            first = a + ctx.f(b)
            outputs = first, b + ctx.g(first)
            grads = torch.autograd.grad(outputs, (a, b, *weights), (da, db))
        return *grads[:2], None, None, *grads[2:]


class Median(torch.autograd.Function):
    """Several outputs, one without a gradient; optional inputs; what needs a gradient is asked."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The median of each row and where it is."""
        value, index = x.median(1)
        return value if scale is None else value * scale, index

    @staticmethod
    def setup_context(ctx: object, inputs: tuple, output: tuple) -> None:
        """Keeps what backward needs."""
        x, scale = inputs
        _, index = output
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, scale)
        ctx.width = x.shape[1]

    @staticmethod
    def backward(ctx: object, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        """Puts the gradient where the median was."""
        index, scale = ctx.saved_tensors
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None
        grad = grad if scale is None else grad * scale
        return torch.zeros(len(index), ctx.width).scatter(1, index[:, None], grad[:, None]), None


class HeatEquation(nn.Module):
    """A physics-informed network: derivatives by its inputs in the loss (Raissi et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        )

    def forward(self, points: Tensor) -> Tensor:
        """The residual of the equation."""
        x, t = points.detach().requires_grad_().unbind(1)
        u = self.net(torch.stack([x, t], 1))
        ux, ut = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (uxx,) = torch.autograd.grad(ux.sum(), x, create_graph=True)
        return (ut - 0.1 * uxx).square().mean()


class Equilibrium(nn.Module):
    """A fixed point, found without gradients, with one differentiable step (Bai et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drive = (
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
            nn.Linear(6, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Iterates, then takes one step with gradients."""
        drive = self.drive(x)
        with torch.no_grad():
            z = torch.zeros_like(drive)
            for _ in range(8):
                z = (0.5 * self.cell(z) + drive).tanh()
        return (0.5 * self.cell(z) + drive).tanh()


class NeuralODE(nn.Module):
    """Runge-Kutta steps of a learnt vector field (Chen et al. 2018)."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.field, self.steps = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), steps

    def forward(self, x: Tensor) -> Tensor:
        """Integrates from 0 to 1."""
        h = 1 / self.steps
        for _ in range(self.steps):
            a = self.field(x)
            b = self.field(x + h / 2 * a)
            c = self.field(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + self.field(x + h * c))
        return x


class Hamiltonian(nn.Module):
    """Moves along the level sets of a learnt energy (Greydanus et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Three leapfrog steps."""
        for _ in range(3):
            slope = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]
            dq, dp = slope.chunk(2, 1)
            x = x + 0.1 * torch.cat([dp, -dq], 1)
        return x


def _adversarial(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.body(x).tanh()
    return m.classes(x), m.domains(Reversal.apply(x, 0.3))


def _reversible(m: nn.Module, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    for _ in range(2):
        a, b = Reversible.apply(a, b, m.f, m.g, *m.f.parameters(), *m.g.parameters())
    return torch.cat([a, b], 1)


def _median(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    value, index = Median.apply(m.body(x), m.scale.detach())
    return value + Median.apply(x * m.scale, None)[0], index


def _clipped(m: nn.Module, x: Tensor) -> Tensor:
    """A hook on a tensor inside changes its gradient."""
    x = m.body(x)
    x.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return m.out(x.tanh())


def _functional(m: nn.Module, x: Tensor) -> Tensor:
    """Derivatives by `torch.func`."""
    net = lambda row: m.out(m.body(row).tanh())  # noqa: E731
    jacobians = torch.func.vmap(torch.func.jacrev(net))(x)
    _, slope = torch.func.jvp(net, (x,), (torch.ones_like(x),))
    return jacobians.square().sum((1, 2)) + slope.sum(1)


_X = batches(normal(5, 6, grad=True))


def all_of() -> list[Architecture]:
    """The networks of the zoo that differentiate by themselves."""
    half = lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh())  # noqa: E731
    linear = lambda width=6: nn.Linear(6, width)  # noqa: E731
    return architectures_of(
        "gradient",
        ("gradient reversal", lambda: Composed(
            _adversarial, body=nn.Linear(6, 6), classes=nn.Linear(6, 3), domains=nn.Linear(6, 2)
        ), _X),
        ("custom activation", lambda: Composed(
            lambda m, x: m.out(Swish.apply(m.body(x))), body=nn.Linear(6, 6), out=nn.Linear(6, 2)
        ), _X),
        ("reversible", lambda: Composed(_reversible, f=half(), g=half()), _X),
        ("custom median", lambda: Composed(_median, body=linear(5), scale=weight(1)), _X),
        ("clipped inside", lambda: Composed(_clipped, body=linear(), out=linear(2)), _X),
        ("jacobians by functions", lambda: Composed(_functional, body=linear(), out=linear(2)), _X),
        ("heat equation", HeatEquation, batches(uniform(5, 2))),
        ("equilibrium", Equilibrium, _X),
        ("neural ode", NeuralODE, _X),
        ("hamiltonian", Hamiltonian, _X),
    )  # fmt: skip
