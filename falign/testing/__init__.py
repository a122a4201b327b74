"""Test batteries for members of your own: a divergence, an objective, a measure, a reward.

Each function raises :class:`falign.errors.CheckError`, an ``AssertionError``, with the place and the value of the first
rule that is broken, and returns nothing. falign's own members pass the same batteries.
"""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign.testing.divergences import check_divergence
    from falign.testing.measures import check_measure
    from falign.testing.objectives import check_objective, example_batch
    from falign.testing.rewards import check_reward
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "falign.testing.divergences": ("check_divergence",),
            "falign.testing.measures": ("check_measure",),
            "falign.testing.objectives": ("check_objective", "example_batch"),
            "falign.testing.rewards": ("check_reward",),
        },
    )

__all__ = ["check_divergence", "check_measure", "check_objective", "check_reward", "example_batch"]
