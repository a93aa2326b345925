"""Make attention cheaper in models you already have: a ``torch.compile`` backend.

    torch.compile(model, backend="distr", options={"policy": "distr.toml"})

finds every softmax(QK^T)V in the model and computes it with DistrAttention (arXiv 2507.17245) where
a policy says so; what it cannot or should not approximate stays exact, with a reason in the report.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distr_compile.accuracy.batch import Batch
    from distr_compile.accuracy.metrics import Metric
    from distr_compile.accuracy.regress import Regression, regress
    from distr_compile.explaining import explain
    from distr_compile.exporting import export
    from distr_compile.functional import attention
    from distr_compile.packed import attention_varlen
    from distr_compile.policy import LayerPlan, Policy, PolicyError, Rule
    from distr_compile.regional import compile_blocks
    from distr_compile.reporting import DistrWarning, Report, SiteRow, report
    from distr_compile.tuning.calibrate import Calibration, calibrate
    from distr_compile.tuning.tune import tune
    from distr_compile.tuning.tuned import Tuning
    from distr_compile.verifying import Verification, verify

__all__ = [
    "Batch",
    "Calibration",
    "DistrWarning",
    "LayerPlan",
    "Metric",
    "Policy",
    "PolicyError",
    "Regression",
    "Report",
    "Rule",
    "SiteRow",
    "Tuning",
    "Verification",
    "attention",
    "attention_varlen",
    "calibrate",
    "compile_blocks",
    "explain",
    "export",
    "regress",
    "report",
    "tune",
    "verify",
]

_HOMES = {
    **dict.fromkeys(("LayerPlan", "Policy", "PolicyError", "Rule"), "policy"),
    **dict.fromkeys(("DistrWarning", "Report", "SiteRow", "report"), "reporting"),
    "attention": "functional",
    "attention_varlen": "packed",
    "compile_blocks": "regional",
    "explain": "explaining",
    "export": "exporting",
    **dict.fromkeys(("Calibration", "calibrate"), "tuning.calibrate"),
    **dict.fromkeys(("Regression", "regress"), "accuracy.regress"),
    "Batch": "accuracy.batch",
    "Tuning": "tuning.tuned",
    "tune": "tuning.tune",
    "Metric": "accuracy.metrics",
    **dict.fromkeys(("Verification", "verify"), "verifying"),
}


_MODULES = ("ops", "parallel", "transformers")
"""Modules that are reached by their names without an import of their own."""


# Lazy: TORCH_LOGS="+distr_compile" makes torch import this package while torch itself is loading.
def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _is_loaded(name: str) -> bool:
    """Whether a module was imported to its end."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


# Saved programs then load after ``import torch, distr_compile``; ``distr_compile.ops`` always does.
if _is_loaded("torch"):
    importlib.import_module(f"{__name__}.ops")
