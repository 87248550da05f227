"""The exceptions and warnings of fxckpt.

    FxckptError
    ├── CaptureError    the graph of a model could not be captured exactly
    ├── PolicyError     a policy or selector means nothing for this model
    ├── BudgetError     no plan fits the memory budget
    └── MismatchError   `verify` found a value that differs from eager

    FallbackWarning     a unit runs eagerly, unrewritten; says why and what to do

Every message says what was called, what was expected, what came, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator


class FxckptError(Exception):
    """Base of all exceptions that fxckpt raises on its own account."""


class CaptureError(FxckptError):
    """The model does something that a captured graph cannot reproduce exactly.

    Attributes:
        reason: What the model did, in one sentence.
        path: Module path where it happened (`""` is the root).
        source: The user's source line, `"file.py:12"`, or `""` if unknown.
        hint: What the user can do about it.
        may_pass: Whether the next call may do better: models prepare things at their first.
    """

    def __init__(
        self,
        reason: str,
        *,
        path: str = "",
        source: str = "",
        hint: str = "",
        may_pass: bool = False,
    ) -> None:
        self.reason, self.path, self.source, self.hint = reason, path, source, hint
        self.may_pass = may_pass
        where = f" in module {path!r}" if path else ""
        at = f" at {source}" if source else ""
        super().__init__(f"{reason}{where}{at}.{' ' + hint if hint else ''}")

    def at(self, path: str, source: str) -> CaptureError:
        """The same error at another place, without the frames that it came through."""
        return CaptureError(
            self.reason, path=path, source=source, hint=self.hint, may_pass=self.may_pass
        )


def with_causes(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, but not what was being `handled` when it all began."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and link is not handled and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def let_go_of_frames(error: BaseException, handled: BaseException | None) -> None:
    """Drops the tracebacks of an error and its causes: their frames keep tensors, and the error."""
    for each in with_causes(error, handled):
        trace, each.__traceback__ = each.__traceback__, None
        while trace is not None:  # which running context managers keep
            trace.tb_next, trace = None, trace.tb_next


class PolicyError(FxckptError, ValueError):
    """A policy, selector or plan does not make sense for the model it was given."""


class BudgetError(FxckptError, ValueError):
    """No plan fits the memory budget."""


class MismatchError(FxckptError, AssertionError):
    """`fxckpt.verify` found a value that differs between eager and rewritten."""


class FallbackWarning(UserWarning):
    """A unit could not be captured and runs eagerly: exact, but without saving memory."""
