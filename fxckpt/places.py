"""Where in the user's program an operation comes from: module path, call and source line."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from fxckpt import invisible

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_STANDARD_LIBRARY = str(Path(contextlib.__file__).parent)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of one module; the root's path is `""`, its class in a bare function `object`."""

    path: str
    index: int
    cls: type

    @property
    def name(self) -> str:
        """`"h.3.attn"`, or `"h.3.attn (call 2)"` from the second call on."""
        return f"{self.path or '(root)'}" + (f" (call {self.index + 1})" if self.index else "")


Chain = tuple[Call, ...]  # from the root to the innermost call


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """Where a captured module stands in the model that was rewritten.

    Attributes:
        path: Its path; `""` if it is the model itself.
        copies: How many modules of its kind the model has.
    """

    path: str = ""
    copies: int = 1

    @property
    def is_part(self) -> bool:
        """Whether the captured module is but a part of the model that was rewritten."""
        return bool(self.path)


ROOT = Position()


def kind(path: str, cls: type) -> Hashable:
    """What repeated modules have in common: the class; for an `nn.Sequential`, the list it is in.

    None for the model itself, and for what is not in a list and may be anything.
    """
    parent, _, last = path.rpartition(".")
    if not path:
        return None
    if cls is not nn.Sequential:
        return cls
    return (parent, nn.Sequential) if last.isdigit() else None


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where in the user's program an operation was run: in which module calls, at which line."""

    calls: Chain = ()
    source: str = ""

    @property
    def path(self) -> str:
        """The path of the innermost running module."""
        return self.calls[-1].path if self.calls else ""


class Places:
    """Where in the user's program the recorder is: callable for `Recorder.place`.

    Forward operations get the innermost running module and the user's source line; backward ones
    get those of the forward operation that created the running autograd node, found by the
    sequence number that autograd gives to both.
    """

    def __init__(self, module: nn.Module | None, position: Position) -> None:
        self.phase, self.position = "forward", position
        self._paths: dict[int, str] = {}
        if module is not None:
            for path, m in module.named_modules(prefix=position.path):
                self._paths.setdefault(id(m), path)
        root = Call(position.path, 0, object if module is None else type(module))
        self._stack: list[Chain] = [(root,)]
        self._calls: dict[str, int] = {}
        self._by_sequence: dict[int, Place] = {}
        self._numbers: list[int] = []  # its keys, ascending

    def __call__(self) -> Place:
        if self.phase == "backward":
            node = torch._C._current_autograd_node()
            return Place() if node is None else self._of_sequence(node._sequence_nr())
        place = Place(self._stack[-1], user_source())
        number = torch._C._autograd._get_sequence_nr() - 1
        if number not in self._by_sequence:
            self._by_sequence[number] = place
            self._numbers.append(number)
        return place

    def _of_sequence(self, number: int) -> Place:
        """The place of the operation that made an autograd node, or of the last one before it.

        Mutation through views makes nodes after its operation was recorded.
        """
        known = self._by_sequence.get(number)
        if known is None:
            earlier = bisect.bisect_right(self._numbers, number) - 1
            known = self._by_sequence[self._numbers[earlier]] if earlier >= 0 else Place()
        return known

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follows calls of modules of this thread while active."""
        with invisible.module_calls(self._enter, self._leave):
            yield

    def _enter(self, m: nn.Module) -> None:
        above = self._stack[-1]
        path = self._paths.get(id(m)) or f"{above[-1].path}.{type(m).__name__}".lstrip(".")
        self._calls[path] = self._calls.get(path, -1) + 1
        self._stack.append((*above, Call(path, self._calls[path], type(m))))

    def _leave(self) -> None:
        self._stack.pop()


def user_source() -> str:
    """`"file.py:31"` of the innermost frame that is the user's, not torch's or ours."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_users(frame):
            return _line(frame, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def stack_level_of_user() -> int:
    """The `stacklevel` with which the caller's warning points at the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and not _is_users(frame):
        frame, level = frame.f_back, level + 1
    return level


def user_source_of(error: BaseException) -> str:
    """`"file.py:31"` of the innermost frame of the user's program that an error went through."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        if _is_users(trace.tb_frame):
            found = _line(trace.tb_frame, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _is_users(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    if name.startswith(_STANDARD_LIBRARY) and "site-packages" not in name:
        return False
    return not name.startswith((_TORCH, _HERE, "<"))


def _line(frame: FrameType, number: int) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{number}"
