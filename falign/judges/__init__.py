"""LLM judges behind OpenAI-compatible endpoints: questions, verdicts, retries, cache and cost.

:class:`Judge` asks; :mod:`falign.rewards.judge` uses it as a reward and as a preference oracle, and
:func:`falign.evaluate_judge` as an evaluator.
"""

from falign.judges.endpoint import Endpoint, read_endpoint
from falign.judges.judge import Judge, Judgment
from falign.judges.pairs import Compared, PositionCounts, compare, position_counts
from falign.judges.prompts import COMPARE, COMPARE_FIVE, RATE, JudgeTemplate, conversation_text, read_template
from falign.judges.verdicts import FIVE, PAIR, ChoiceForm, MalformedError, ScoreForm, VerdictForm

__all__ = [
    "COMPARE",
    "COMPARE_FIVE",
    "FIVE",
    "PAIR",
    "RATE",
    "ChoiceForm",
    "Compared",
    "Endpoint",
    "Judge",
    "JudgeTemplate",
    "Judgment",
    "MalformedError",
    "PositionCounts",
    "ScoreForm",
    "VerdictForm",
    "compare",
    "conversation_text",
    "position_counts",
    "read_endpoint",
    "read_template",
]
