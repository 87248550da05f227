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
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxckpt.installation import install, installed, uninstall
from fxckpt.locks import LOCK
from fxckpt.modes import autocast_state
from fxckpt.places import Position, kind


class Parts:
    """Some submodules of a module, and what runs them while the module runs.

    Attributes:
        runs: How often the module ran.

    Args:
        root: The module; only a weak reference is kept.
        parts: The submodules, and where they stand.
        make: Makes the runner of a part: of the module and its position.
    """

    def __init__(
        self,
        root: nn.Module,
        parts: Iterable[tuple[nn.Module, Position]],
        make: Callable[[nn.Module, Position], Any],
    ) -> None:
        self._parts = [(m, position, make(m, position)) for m, position in parts]
        self._root = weakref.ref(root)
        self.runs = 0
        self._sharing: set[str] | None = None  # found in this run
        self._users = 0
        self._thread = threading.local()

    def runners(self) -> list[tuple[str, Any]]:
        """The runners of the parts, with the paths of these."""
        return [(position.path, runner) for _, position, runner in self._parts]

    def shares(self, path: str) -> bool:
        """Whether the rest of the module uses parameters of a part, in this run."""
        if self._sharing is None:
            root = self._root()
            assert root is not None, "it is running"
            self._sharing = self._found_sharing(root)
        return path in self._sharing

    def _found_sharing(self, root: nn.Module) -> set[str]:
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
        self.runs += 1
        self._sharing = None
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


class CastOnce:
    """Whether eager may cast a weight of a part once, by autocast, for several uses of it.

    Then it sums the gradients of these uses before it casts them back.

    Args:
        path: Of the part.
        waits: Whether to wait for the second run, when it is known what is called several times.
    """

    def __init__(self, path: str, *, waits: bool) -> None:
        self._path, self._waits, self._latest_run = path, waits, 0
        self.is_called_again = False  # within one run of the whole

    def may_be(self, parts: Parts) -> bool:
        """Whether that may be so at this call, as far as is known after the calls so far."""
        state = autocast_state()
        if not state or ("cache", False) in state:
            return False
        self.is_called_again |= self._latest_run == parts.runs
        self._latest_run = parts.runs
        unknown = self._waits and parts.runs == 1
        return self.is_called_again or unknown or parts.shares(self._path)

    def take_back(self) -> None:
        """The latest call was none."""
        self._latest_run = 0


def submodules(root: nn.Module) -> Iterator[tuple[nn.Module, Position]]:
    """All submodules that may be captured by themselves."""
    modules = [*root.named_modules()]
    copies = Counter(kind(path, type(m)) for path, m in modules)
    runners = {path: installed(m) for path, m in modules if path}
    rewritten = [p for p, runner in runners.items() if runner is not None and not runner.passing]
    for path, m in modules:
        inside = any(path == r or path.startswith(f"{r}.") for r in rewritten)
        if path and not inside and is_composed(m):
            yield m, Position(path, copies[kind(path, type(m))])


def has_forward(m: nn.Module) -> bool:
    """Whether a module has a forward of its own that is Python."""
    return not isinstance(m, torch.jit.ScriptModule) and type(m).forward is not nn.Module.forward


def is_composed(m: nn.Module) -> bool:
    """Whether a module has a forward, and is more than a single layer of torch."""
    of_torch = type(m).__module__.startswith("torch.nn.modules")
    return has_forward(m) and (not of_torch or any(True for _ in m.children()))


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
