"""Activation checkpointing as a graph rewrite, from scratch: the ideas of fxckpt in 150 lines.

A model is captured as one graph of forward and backward operations; a budget decides which values
are saved; the graph is split in two, and one `autograd.Function` runs the halves. What makes a
library of it is left out: signatures, buffers, replays of random draws, values that Python reads,
gradients of inputs, higher order, optimal plans. The names in brackets say where fxckpt does it.
"""

from operator import getitem

import torch
from torch import fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
VIEWS = {aten.t.default, aten.view.default, aten.transpose.int, aten.expand.default}
VIEWS |= {aten._unsafe_view.default, aten.unsqueeze.default, aten.detach.default, getitem}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default}


# --- 1. capture: forward and backward in one graph [capture.py, recorder.py, tape.py]


def capture(model, x):
    """The graph; its arguments are the parameters, the input and the gradient of the output."""
    names = [name for name, _ in model.named_parameters()]

    def step(parameters, x, cotangent):
        out = functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return out, *torch.autograd.grad(out, parameters, cotangent)  # the real autograd engine

    example = [*model.parameters()], x, torch.empty_like(model(x))
    recorded = make_fx(step, tracing_mode="fake")(*example)  # fake: shapes without memory
    return make_fx(functionalize(recorded), tracing_mode="fake")(*example).graph


class Joint:
    """The nodes of the graph by their roles [joint.py]."""

    def __init__(self, graph):
        *self.primals, self.cotangent = (n for n in graph.nodes if n.op == "placeholder")
        self.out, *self.grads = graph.output_node().args[0]
        late = {self.cotangent}  # what depends on the gradient of the output is backward
        for n in graph.nodes:
            late |= {n} if late & {*n.all_input_nodes} else set()
        operations = [n for n in graph.nodes if n.op == "call_function"]
        self.backward = [n for n in operations if n in late]
        self.forward = [n for n in operations if n not in late]
        self.values = [n for n in self.forward if n.target not in VIEWS]


def size(n):
    """The bytes of a node's own memory: views have none, so they are never saved."""
    val = n.meta["val"]
    tensors = [] if n.target in VIEWS else val if isinstance(val, (tuple, list)) else [val]
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def root(n):
    """The node in whose memory a view is."""
    return root(n.args[0]) if n.target in VIEWS else n


# --- 2. split: recompute right before the use [schedule.py, split.py]


def schedule(joint, saved):
    """What backward runs, recomputation included, and the residuals that it reads."""
    there, steps, residuals = {joint.cotangent, *joint.primals}, [], []

    def fetch(n):
        if n not in there:
            there.add(n)
            if n in saved:
                residuals.append(n)
            else:
                for read in n.all_input_nodes:
                    fetch(read)
                steps.append(n)

    for n in joint.backward:
        fetch(n)
    return steps, residuals


def code(arguments, steps, results):
    """A function that runs the steps, and drops each value after its last use [codegen.py]."""
    graph = fx.Graph()
    copies = {n: graph.placeholder(n.name) for n in arguments}
    for n in steps:
        copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(tuple(copies[n] for n in results))
    return fx.GraphModule({}, graph).forward


# --- 3. count: the bytes at every step; nothing is run [memory.py, ledger.py]


def peak(joint, saved):
    """The most that lives at any moment, above parameters and input."""
    steps, residuals = schedule(joint, saved)
    held = {root(n) for n in (joint.out, *residuals)}
    given = {joint.cotangent, *held}
    after = sum(map(size, given))
    return max(
        most(joint.forward, held, 0), most(steps, {root(n) for n in joint.grads}, after, given)
    )


def most(steps, kept, live, there=()):
    """The peak while steps run: a value dies after its last use, unless it is kept."""
    last = {root(read): i for i, n in enumerate(steps) for read in (n, *n.all_input_nodes)}
    top = live
    for i, n in enumerate(steps):
        live += size(n)
        top = max(top, live)
        made = (
            v for v, use in last.items() if use == i and (v.op == "call_function" or v in there)
        )
        live -= sum(size(v) for v in made if v not in kept)
    return top


# --- 4. decide: a policy, or a budget [policies.py; planner.py, solve.py, search.py]


def dots(joint):
    """Saves products, as `policy="dots"` does."""
    return {n for n in joint.values if n.target in PRODUCTS or is_random(n)}


def is_random(n):
    """Drawn again it would be another mask; fxckpt replays the state of the generator."""
    return torch.Tag.nondeterministic_seeded in n.target.tags


def within(budget):
    """Lets go of what lowers the peak most, one value after the other, until it fits."""

    def decide(joint):
        saved = {*joint.values}
        while peak(joint, saved) > budget:
            options = [saved - {n} for n in saved if not is_random(n) and n.target not in PRODUCTS]
            options = options or [saved - {n} for n in saved if not is_random(n)]
            best = min(options, key=lambda option: peak(joint, option), default=saved)
            if best == saved:
                raise ValueError(f"no plan found within {budget} bytes")
            saved = best
        return saved

    return decide


# --- 5. run: one autograd.Function [runtime.py, module.py]


def rewrite(model, x, decide):
    """The model as a function of inputs that look like `x`."""
    joint = Joint(capture(model, x))
    saved = decide(joint)
    steps, residuals = schedule(joint, saved)
    forward = code(joint.primals, joint.forward, [joint.out, *residuals])
    backward = code([*joint.primals, *residuals, joint.cotangent], steps, joint.grads)

    class Rewritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *primals):
            out, *kept = forward(*primals)
            ctx.save_for_backward(*primals, *kept)  # so that changing one of them raises
            return out

        @staticmethod
        def backward(ctx, cotangent):
            return *backward(*ctx.saved_tensors, cotangent), None

    return lambda x: Rewritten.apply(*model.parameters(), x)


def main():
    """For several decisions: the peak, and whether loss and gradients have the bits of eager."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1))]
    model, x = nn.Sequential(*layers), torch.randn(1024, 64)
    joint, found = Joint(capture(model, x)), {}
    eager = peak(joint, {*joint.values})
    for name, decide in {"all": within(eager), "dots": dots, "70%": within(0.7 * eager)}.items():
        results = []
        for run in (model, rewrite(model, x, decide)):
            torch.manual_seed(1)
            loss = run(x).square().mean()
            results.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
        found[name] = peak(joint, decide(joint)) / eager, all(map(torch.equal, *results))
        print(f"{name:>4}: {found[name][0]:4.0%} of the peak, bitwise equal: {found[name][1]}")
    return found


if __name__ == "__main__":
    main()
