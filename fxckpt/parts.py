"""The submodules of a module that cannot be captured as a whole, each with a runner of its own.

NOTE [Fallback by parts]

While a module runs eagerly, all submodules that have a forward of their own run it by a runner that
tries to capture it. The outermost ones are called first: where one is captured, those inside of it
are not called, and where it is not, its original forward calls them. So the largest submodules that
can be captured are, and only the rest runs eagerly. Afterwards the submodules are as they were,
since the original of a rewritten module shares them.

Single layers of `torch.nn` have nothing inside that could be recomputed; they are left alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fxckpt.installation import install, installed, uninstall
from fxckpt.locks import LOCK
from fxckpt.places import Position, kind


class Parts:
    """The parts of one module.

    Args:
        root: The module.
        make: Makes the runner of a part: of the module and its position.
    """

    def __init__(self, root: nn.Module, make: Callable[[nn.Module, Position], Any]) -> None:
        self._parts = [
            (m, position, make(m, position)) for m, position in _parts(list(root.named_modules()))
        ]
        self._users = 0
        self._thread = threading.local()

    def runners(self) -> list[tuple[str, Any]]:
        """The runners of the parts, with the paths of these."""
        return [(position.path, runner) for _, position, runner in self._parts]

    def sharing(self, root: nn.Module) -> set[str]:
        """The paths of the parts with parameters that the rest of the root uses, too."""
        owners: dict[int, set[str]] = {}
        for path, m in root.named_modules():
            for p in m._parameters.values():
                owners.setdefault(id(p), set()).add(path)

        def is_inside(user: str, path: str) -> bool:
            return user == path or user.startswith(f"{path}.")

        return {
            position.path
            for m, position, _ in self._parts
            for p in m.parameters()
            if not all(is_inside(user, position.path) for user in owners[id(p)])
        }

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While active, calls of the parts go to their runners."""
        before = getattr(self._thread, "hooks", None)
        self._thread.hooks = (_saved_tensor_hooks(),)
        with LOCK:
            self._users += 1
            for m, _, runner in self._parts:
                if installed(m) is None:
                    install(m, runner)
        try:
            yield
        finally:
            self._thread.hooks = before
            with LOCK:
                self._users -= 1
                if not self._users:
                    for m, _, runner in self._parts:
                        if installed(m) is runner:
                            uninstall(m)

    def active(self) -> bool:
        """Whether the parts may run what was captured of them.

        Not in a thread that does not run the whole module, and not inside a checkpoint of the
        module's own, as its recomputation happens when the parts are not in place any more.
        """
        return getattr(self._thread, "hooks", None) == (_saved_tensor_hooks(),)


def _parts(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[nn.Module, Position]]:
    copies = Counter(kind(path, type(m)) for path, m in modules)
    runners = {path: installed(m) for path, m in modules if path}
    rewritten = [p for p, runner in runners.items() if runner is not None and not runner.passing]
    for path, m in modules:
        inside = any(path == r or path.startswith(f"{r}.") for r in rewritten)
        if path and not inside and _may_be_captured(m):
            yield m, Position(path, copies[kind(path, type(m))])


def _may_be_captured(m: nn.Module) -> bool:
    if isinstance(m, torch.jit.ScriptModule) or type(m).forward is nn.Module.forward:
        return False
    of_torch = type(m).__module__.startswith("torch.nn.modules")
    return not of_torch or any(True for _ in m.children())


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
