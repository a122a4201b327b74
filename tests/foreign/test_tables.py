"""The tables of other libraries: TRL's against the installed release, and all of them against the run file."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, RewardConfig, RLOOConfig, ScriptArguments, SFTConfig
from trl.scripts.utils import DatasetMixtureConfig

from falign.errors import NAMES, ConfigError
from falign.foreign.axolotl_rows import AXOLOTL
from falign.foreign.axolotl_rows import DEFAULTS as AXOLOTL_DEFAULTS
from falign.foreign.libraries import LIBRARIES
from falign.foreign.llamafactory_rows import DEFAULTS as FACTORY_DEFAULTS
from falign.foreign.llamafactory_rows import LLAMAFACTORY
from falign.foreign.translation import Translation
from falign.foreign.trl_commands import translated
from falign.foreign.trl_rows import COMMANDS, OLDER, TRL
from falign.runfile.reading import valid_paths

CLASSES = {
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "sft": SFTConfig,
    "grpo": GRPOConfig,
    "rloo": RLOOConfig,
    "reward": RewardConfig,
}
OF_SCRIPTS = {"reward_funcs", "reward_model_name_or_path", "accelerate_config", "num_processes"}
PATHS = {*valid_paths()}


def defaults_of(*classes):
    found = {}
    for each in classes:
        for field in dataclasses.fields(each):
            made = field.default_factory
            found[field.name] = field.default if made is dataclasses.MISSING else made()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_and_names_are_those_of_the_installed_trl(command):
    installed = defaults_of(CLASSES[command], ModelConfig, ScriptArguments, DatasetMixtureConfig)
    assert not {name for name in installed if name not in TRL and not NAMES.search(name)}
    ours = COMMANDS[command]
    for name, value in ours.items():
        if name in installed and name != "output_dir":  # which TRL makes in __post_init__
            assert installed[name] == value, name
        else:
            assert name in OLDER | OF_SCRIPTS | {"output_dir"}, name
    read_there = {name for name in installed if TRL[name].use in ("copied", "read")} if ours else set()
    own = {name for name in read_there if name in defaults_of(CLASSES[command]) and name not in ours}
    unaware = own - defaults_of(TrainingArguments).keys()
    assert not {name for name in unaware if TRL[name].fields and TRL[name].use == "read"}, unaware


@pytest.mark.parametrize(
    ("table", "defaults"), [(LLAMAFACTORY, FACTORY_DEFAULTS), (AXOLOTL, AXOLOTL_DEFAULTS), (TRL, {})]
)
def test_every_field_that_a_row_names_exists_and_every_default_has_a_row(table, defaults):
    for name, row in table.items():
        assert {path for path in row.fields if not path.startswith("training.extra.")} <= PATHS, name
        assert row.fields or row.note, name
        assert not row.note.endswith("."), name
        assert row.use != "copied" or len(row.fields) == 1, name
    assert defaults.keys() <= table.keys()
    assert all(table[name].use in ("copied", "read") for name in defaults)


def test_each_library_is_one_function_of_one_module():
    for name in LIBRARIES.names():
        assert callable(LIBRARIES.get(name))
        module = str(LIBRARIES.members[name]).partition(":")[0]
        assert Path(importlib.util.find_spec(module).origin).is_file()


def test_a_setting_of_another_command_is_refused_and_one_without_effect_is_listed():
    least = {"model_name_or_path": "m", "dataset_name": "d"}
    with pytest.raises(ConfigError, match=r"num_generations: 4 has no counterpart: trl dpo has no such setting"):
        run_of({**least, "num_generations": 4}, "dpo")
    run = run_of({**least, "f_alpha_divergence_coef": 0.3}, "dpo")
    assert run.unused == {"f_alpha_divergence_coef": "without effect beside the other settings"}
    run = run_of({**least, "bf16": False, "ld_alpha": None}, "dpo")
    assert run.unused == dict.fromkeys(("bf16", "ld_alpha"), "the run has it so without a setting")


def test_the_same_value_as_the_default_is_not_an_effect():
    run = run_of(
        {"model_name_or_path": "m", "dataset_name": "d", "top_p": 1.0, "delta": None, "reward_funcs": "a.b"}, "grpo"
    )
    assert not run.refusals
    with pytest.raises(ConfigError, match=r"top_p: 0\.9 has no counterpart.*\n.*delta: 2\.0 has no counterpart"):
        run_of(
            {"model_name_or_path": "m", "dataset_name": "d", "top_p": 0.9, "delta": 2.0, "reward_funcs": "a.b"}, "grpo"
        )


def run_of(given, command) -> Translation:
    return translated(given, command=command, folder=Path(), processes=None)
