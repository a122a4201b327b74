"""Preference alignment of language models under the f-divergence of your choice.

A name is imported when it is first used: ``falign.FDPO`` loads torch and nothing heavier.
"""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign import audit, divergences, methods, objectives
    from falign.api import Lora, Run, load, train
    from falign.evaluation.answering import sample
    from falign.evaluation.frontier_run import evaluate_frontier
    from falign.evaluation.judged.evaluation import evaluate_judge
    from falign.evaluation.pairs_run import pairs
    from falign.evaluation.presampling_run import presample
    from falign.evaluation.reward_evaluation import evaluate_rewards
    from falign.evaluation.sample_evaluation import evaluate_samples
    from falign.evaluation.sampling_run import write_samples
    from falign.evaluation.score_run import score
    from falign.methods import DPHRL, FDPG, FDPO, SALSA, SALSARLOO, TDPO
    from falign.objectives import CompletionBatch
    from falign.report import write_report as report
    from falign.runs.export import export, soup
    from falign.training.data_check import check_data
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "falign.api": ("Lora", "Run", "load", "train"),
            "falign.audit": (),  # a package that can be called
            "falign.divergences": (),
            "falign.evaluation.answering": ("sample",),
            "falign.evaluation.frontier_run": ("evaluate_frontier",),
            "falign.evaluation.judged.evaluation": ("evaluate_judge",),
            "falign.evaluation.presampling_run": ("presample",),
            "falign.evaluation.reward_evaluation": ("evaluate_rewards",),
            "falign.evaluation.pairs_run": ("pairs",),
            "falign.evaluation.sample_evaluation": ("evaluate_samples",),
            "falign.evaluation.sampling_run": ("write_samples",),
            "falign.evaluation.score_run": ("score",),
            "falign.methods": (),
            "falign.objectives": (),
            "falign.objectives.batch": ("CompletionBatch",),
            "falign.methods.core": ("DPHRL", "FDPG", "FDPO", "SALSA", "SALSARLOO", "TDPO"),
            "falign.report": (),  # a package that can be called
            "falign.runs.export": ("export", "soup"),
            "falign.training.data_check": ("check_data",),
        },
    )

__version__ = "0.1.0"

__all__ = [
    "DPHRL",
    "FDPG",
    "FDPO",
    "SALSA",
    "SALSARLOO",
    "TDPO",
    "CompletionBatch",
    "Lora",
    "Run",
    "audit",
    "check_data",
    "divergences",
    "evaluate_frontier",
    "evaluate_judge",
    "evaluate_rewards",
    "evaluate_samples",
    "export",
    "load",
    "methods",
    "objectives",
    "pairs",
    "presample",
    "report",
    "sample",
    "score",
    "soup",
    "train",
    "write_samples",
]
