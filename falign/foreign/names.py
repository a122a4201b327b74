"""Names of other libraries in a run file: what they are called here, or why they are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from falign.choices import similar
from falign.foreign.rows import Row
from falign.foreign.trl_rows import TRL

__all__ = ["FOREIGN_NAMES", "KINDS_OF_METHODS", "near_foreign_name"]

KINDS_OF_METHODS = {
    name: kind
    for kind, names in {
        "pairwise": "dpo fdpo f_dpo hdpo h_dpo ipo chipo",
        "unpaired": "kto",
        "token_pairwise": "tdpo sparsepo",
        "supervised": "sft fsft f_sft",
        "policy_gradient": "grpo rloo ppo reinforce dapo",
        "distribution_matching": "fdpg f_dpg",
        "hybrid": "dphrl dph_rl",
        "sequence_match": "sequencematch",
        "distillation": "gkd kd opd",
        "cloning": "best_of_n rft raft",
    }.items()
    for name in names.split()
}
"""The kind of objective that a method's name is looked for under."""

_SAME_NAME = {
    *("output_dir", "seed", "beta", "dtype", "temperature", "max_length"),
    *("attn_implementation", "trust_remote_code", "gradient_checkpointing"),
}
"""Settings outside of ``training`` that the run file has under the same name."""

FOREIGN_NAMES: Mapping[str, Row] = {
    name: row for name, row in TRL.items() if name not in _SAME_NAME and f"training.{name}" not in row.fields[:1]
}
"""Names of other libraries; a name that the run file has in the same place and meaning is left out."""


def near_foreign_name(name: str, rivals: Iterable[str]) -> str | None:
    """Return the foreign name that is nearest to a misspelled one; None if a rival is nearer, or none is near."""
    own = set(rivals)
    close = similar(name, [*own, *FOREIGN_NAMES], cutoff=0.8)
    return close if close not in own else None
