"""fxckpt: PyTorch models that fit in memory, with bit-identical gradients."""

from fxckpt import policies
from fxckpt.errors import (
    BudgetError,
    CaptureError,
    FallbackWarning,
    FxckptError,
    MismatchError,
    PolicyError,
)
from fxckpt.explaining import explain
from fxckpt.functional import checkpoint, name
from fxckpt.joint import Value
from fxckpt.module import graphs, is_rewritten, restore_, rewrite, rewrite_
from fxckpt.planning import fit_batch, frontier, plan
from fxckpt.plans import Plan
from fxckpt.policies import RECOMPUTE, SAVE
from fxckpt.report import Report
from fxckpt.saved import print_saved_values, saved_values
from fxckpt.verification import verify

__version__ = "0.1.0.dev0"

__all__ = [
    "RECOMPUTE",
    "SAVE",
    "BudgetError",
    "CaptureError",
    "FallbackWarning",
    "FxckptError",
    "MismatchError",
    "Plan",
    "PolicyError",
    "Report",
    "Value",
    "checkpoint",
    "explain",
    "fit_batch",
    "frontier",
    "graphs",
    "is_rewritten",
    "name",
    "plan",
    "policies",
    "print_saved_values",
    "restore_",
    "rewrite",
    "rewrite_",
    "saved_values",
    "verify",
]
