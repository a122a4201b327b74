"""The audit of a loss: which divergence its gradient is the gradient of, exactly, in a world that is enumerated.

The package can be called: ``falign.audit(loss, "reverse_kl")`` is :func:`audit`.
"""

from __future__ import annotations

import sys
from types import ModuleType

from falign.audit.auditing import audit
from falign.audit.cases import CASES, Case
from falign.audit.comparison import Comparison
from falign.audit.result import AuditResult
from falign.divergences import Divergence

__all__ = ["CASES", "AuditResult", "Case", "Comparison", "audit"]


class _Audit(ModuleType):
    """The type of this module, which makes it callable."""

    def __call__(
        self,
        loss: object,
        divergence: Divergence | str | None = None,
        *,
        samples: str | None = None,
        level: str | None = None,
        use: str | None = None,
        credit: str | None = None,
        reference: str | None = None,
        name: str | None = None,
    ) -> AuditResult:
        return audit(
            loss,
            divergence,
            samples=samples,
            level=level,
            use=use,
            credit=credit,
            reference=reference,
            name=name,
        )


sys.modules[__name__].__class__ = _Audit
