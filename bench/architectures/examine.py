"""Trains one architecture eagerly and rewritten, compares every bit and counts what is kept."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

import fxckpt
from bench.architectures.case import Architecture
from bench.architectures.training import Training, differences, forward, train

POLICIES = ("nothing", "dots")
_PARTS, _NOTHING = "of its parts (", "without saving memory"  # in the words of `FallbackWarning`
STATUSES = ("whole", "parts", "eager", "wrong", "raises")
"""From best to worst.

whole: captured as one graph. parts: some of its submodules are. eager: nothing is. wrong: differs
from eager. raises: raises an exception that eager does not raise.
"""


@dataclass(slots=True)
class Row:
    """What was found out about one architecture.

    Attributes:
        name: of the architecture.
        family: of the architecture.
        status: one of `STATUSES`, the worst over the policies.
        reason: why the status is not "whole", else "".
        unreproducible: what differs between two eager runs, and was left out of the comparison.
        eager_bytes: kept from forward to backward by eager.
        ratios: what the rewritten model keeps, relative to that, by policy.
        share: of the saving that is left in parts, relative to the model captured whole, by policy.
        first_call: seconds of the first forward and backward of the rewritten model.
    """

    name: str
    family: str
    status: str = "whole"
    reason: str = ""
    unreproducible: list[str] = field(default_factory=list)
    eager_bytes: int = 0
    ratios: dict[str, float] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    first_call: float = 0.0

    def found(self, status: str, reason: str) -> None:
        """Notes what one policy came to, if it is worse than what the others did."""
        if STATUSES.index(status) > STATUSES.index(self.status) or not self.reason:
            self.status, self.reason = status, reason


def examine(
    architecture: Architecture, policies: tuple[str, ...] = POLICIES, *, measured: bool = True
) -> Row:
    """Trains the architecture eagerly and rewritten under each policy, and compares.

    Args:
        architecture: of the zoo, or another one.
        policies: names, as `fxckpt.rewrite` takes them.
        measured: whether to find out the bytes, too. If not, eager is only repeated if something
            differs.

    Example:
        >>> linear = lambda: nn.Linear(2, 2)
        >>> batch = lambda step: ((torch.full((1, 2), float(step)),), {})
        >>> examine(Architecture("linear", "example", linear, batch), ("nothing",)).status
        'whole'
    """
    row = Row(architecture.name, architecture.family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            eager = train(architecture, measured=measured)
            if measured:
                row.unreproducible = _repeated(architecture, eager)
        except Exception as error:
            row.found("raises", f"eager: {_text(error)}")
            return row
        row.eager_bytes = eager.saved
        for policy in policies:
            _examine_policy(architecture, policy, eager, row)
        if measured and row.status == "parts" and architecture.whole is not None:
            row.share = _shares(architecture, architecture.whole, row)
    return row


def _repeated(architecture: Architecture, eager: Training) -> list[str]:
    """What another eager run does differently."""
    return differences(eager.record, train(architecture, measured=False).record)


def _examine_policy(architecture: Architecture, policy: str, eager: Training, row: Row) -> None:
    models: list[nn.Module] = []

    def install(model: nn.Module) -> nn.Module:
        models.append(fxckpt.rewrite(model, policy))
        return models[0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours = train(architecture, install, measured=eager.saved > 0)
        except Exception as error:
            row.found("raises", f"{policy}: {_text(error)}")
            return
    if eager.saved:
        row.ratios[policy] = ours.saved / eager.saved
    row.first_call = row.first_call or ours.first_call
    wrong = differences(eager.record, ours.record)
    row.unreproducible = row.unreproducible or (wrong and _repeated(architecture, eager))
    if unexplained := [name for name in wrong if name not in row.unreproducible]:
        row.found("wrong", f"{policy}: {unexplained[0]}")
    row.found(*_captured(architecture, models[0], policy, _reason(caught)))


def _captured(
    architecture: Architecture, model: nn.Module, policy: str, reason: str
) -> tuple[str, str]:
    """How much of the trained model was captured, and if not all, why."""
    try:
        fxckpt.graphs(model)
    except fxckpt.FxckptError:
        return ("parts" if _PARTS in reason else "eager"), reason or "nothing is differentiable"
    if not reason:
        return "whole", ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forward(architecture, fxckpt.rewrite_(model.train(), policy), 1)
    if _reason(caught):
        return "parts", f"some calls are captured whole; in others, {reason}"
    return "whole", f"from the second call on; in the first one, {reason}"


def _reason(caught: list[warnings.WarningMessage]) -> str:
    """The warning of the whole model; those of its parts come before."""
    texts = [str(w.message) for w in caught if isinstance(w.message, fxckpt.FallbackWarning)]
    of_whole = (text for text in texts if _PARTS in text or _NOTHING in text)
    return next(of_whole, texts[0] if texts else "")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _shares(
    architecture: Architecture, whole: Callable[[], nn.Module], row: Row
) -> dict[str, float]:
    """The saving in parts, relative to that of the model which can be captured whole."""
    reference = examine(
        dataclasses.replace(architecture, make=whole, whole=None), tuple(row.ratios)
    )
    if reference.status != "whole":
        return {}
    return {p: (1 - r) / (1 - reference.ratios[p]) for p, r in row.ratios.items()}
