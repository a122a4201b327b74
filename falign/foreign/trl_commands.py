"""The commands of TRL: which one a configuration belongs to, and its translation."""

from __future__ import annotations

from pathlib import Path

from falign.choices import nearest
from falign.errors import ConfigError
from falign.foreign import trl, trl_online
from falign.foreign.rows import Value
from falign.foreign.translation import Translation
from falign.foreign.trl_rows import COMMANDS, OF_ONE, TRL

__all__ = ["translated"]

ELSEWHERE = {
    "distillation": "objective.kind=distillation has other settings; docs/distillation.md and configs/kd-polite.yaml",
    "gkd": "objective.kind=distillation has other settings; docs/distillation.md and configs/opd-arithmetic.yaml",
    "cpo": "CPO and SimPO are defined without a reference, which preference objectives of falign have",
    "orpo": "ORPO is defined without a reference, which preference objectives of falign have",
    "ppo": "TRL's experimental trainer has other settings; configs/ppo-arithmetic.yaml is PPO with a value head",
    "online_dpo": "prompts with objective.kind=pairwise are that; configs/online-fdpo-polite.yaml",
}


def translated(given: dict[str, Value], *, command: str | None, folder: Path, processes: int | None) -> Translation:
    """Return the translation of a configuration of TRL.

    Args:
        given: The settings, as in the file of ``trl dpo --config``.
        command: ``dpo``, ``kto``, ``sft``, ``reward``, ``grpo`` or ``rloo``; by default it is recognized.
        folder: The folder of the file.
        processes: Number of processes of their run.

    Raises:
        ConfigError: Settings are unknown, invalid or have no counterpart, or the command is.
    """
    name = _recognized(given) if command is None else command
    if name not in COMMANDS:
        close = nearest(name, [*COMMANDS, *ELSEWHERE])
        reason = ELSEWHERE.get(name, f"did you mean {close}?" if close else f"choose one of {', '.join(COMMANDS)}")
        raise ConfigError(f"trl {name} is not imported: {reason}.")
    settings = {**given, **({} if processes is None else {"num_processes": processes})}
    run = Translation("TRL", f"trl {name}", settings, COMMANDS[name], TRL)
    run.require_known()
    run.apply_rows()
    module = trl if name in trl.OBJECTIVES else trl_online
    module.translate(run, name, folder)
    run.finish()
    return run


def _recognized(given: dict[str, Value]) -> str:
    """Return the command by a setting that it alone has."""
    found = [name for name, only in OF_ONE.items() if given.keys() & set(only.split())]
    if not found and given.keys() & {"num_generations", "reward_funcs"}:
        found = ["grpo", "rloo"]
    if len(found) != 1:
        raise ConfigError(
            f"the settings fit {' and '.join(f'trl {name}' for name in found) or 'several commands of TRL'}: say which "
            f"with --method, one of {', '.join(COMMANDS)}."
        )
    return found[0]
