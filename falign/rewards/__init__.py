"""Rewards of completions: callables, verifiers in killable processes, reward models, and their sums.

Reward models load transformers and are imported from their modules: :mod:`falign.rewards.classifier` and
:mod:`falign.rewards.implicit`.
"""

from falign.rewards.base import Reward, RowReward, Scores, ScoringReward, call_reward, check_rewards, select_columns
from falign.rewards.built_in import choice, load_reward, mathematics, number, regex, sections, sql
from falign.rewards.child import Call, ChildPool, Outcome, shared_pool
from falign.rewards.combination import Rewards, RewardSum, WeightedReward
from falign.rewards.groups import GroupShares, best_of_n, calibrate, group_shares, keep, pass_at_k, pass_rates
from falign.rewards.identity import Identified, Identity, reward_identities, reward_identity
from falign.rewards.judge import JudgeOracle, JudgeReward
from falign.rewards.lexicon import Lexicon, Words, fit_lexicon, read_labeled, read_lexicon
from falign.rewards.oracle import CountingOracle, OracleReward, PreferenceOracle, Preferences
from falign.rewards.own_function import OwnFunction, TimedFunction
from falign.rewards.transforms import Calibrated, Calibration, RewardTransform, inference_transform
from falign.rewards.verifier import Verifier

__all__ = [
    "Calibrated",
    "Calibration",
    "Call",
    "ChildPool",
    "CountingOracle",
    "GroupShares",
    "Identified",
    "Identity",
    "JudgeOracle",
    "JudgeReward",
    "Lexicon",
    "OracleReward",
    "Outcome",
    "OwnFunction",
    "PreferenceOracle",
    "Preferences",
    "Reward",
    "RewardSum",
    "RewardTransform",
    "Rewards",
    "RowReward",
    "Scores",
    "ScoringReward",
    "TimedFunction",
    "Verifier",
    "WeightedReward",
    "Words",
    "best_of_n",
    "calibrate",
    "call_reward",
    "check_rewards",
    "choice",
    "fit_lexicon",
    "group_shares",
    "inference_transform",
    "keep",
    "load_reward",
    "mathematics",
    "number",
    "pass_at_k",
    "pass_rates",
    "read_labeled",
    "read_lexicon",
    "regex",
    "reward_identities",
    "reward_identity",
    "sections",
    "select_columns",
    "shared_pool",
    "sql",
]
