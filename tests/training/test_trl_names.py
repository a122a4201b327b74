"""Every setting of the installed TRL, transformers and PEFT is answered with its field, or with the reason for none."""

import dataclasses

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig

from falign.errors import ConfigError
from falign.passwords import NAMES
from falign.training import parse_run
from falign.training.run_file import valid_paths
from falign.training.trl_names import FOREIGN_NAMES

LEAST = {"output_dir": "run", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
PATHS = list(valid_paths())
SAME = {
    "attn_implementation": "model.attn_implementation",
    "beta": "objective.beta",
    "dtype": "model.dtype or reference.dtype",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "max_length": "data.max_length or prompts.max_length",
    "output_dir": "output_dir",
    "r": "adapter.r",
    "revision": "model.revision",
    "seed": "seed",
    "target_modules": "adapter.target_modules",
    "temperature": "rollout.temperature or sampling.temperature",
    "trust_remote_code": "model.trust_remote_code",
}
"""Settings that are fields of the same name outside of ``training``, and what is said of one in a wrong section."""


def names_of(config):
    return [field.name for field in dataclasses.fields(config)]


def answer(name, section="sampling"):
    with pytest.raises(ConfigError) as caught:
        parse_run({**LEAST, section: {**LEAST.get(section, {}), name: 1}})
    message = str(caught.value)
    assert message.startswith(f"run: unknown key '{section}.{name}'"), message
    return message


@pytest.mark.parametrize(
    "config",
    [
        DPOConfig,
        GRPOConfig,
        KTOConfig,
        SFTConfig,
        RewardConfig,
        TrainingArguments,
        LoraConfig,
        ModelConfig,
        ScriptArguments,
    ],
)
def test_every_setting_has_an_answer(config):
    names = names_of(config)
    assert len(names) >= 6
    for name in names:
        if NAMES.search(name):
            with pytest.raises(ConfigError, match=f"sampling.{name} is a secret by its name"):
                parse_run({**LEAST, "sampling": {name: 1}})
        elif name in FOREIGN_NAMES:
            assert answer(name).endswith(FOREIGN_NAMES[name].told())
        elif name in SAME:
            assert answer(name, "unknown").endswith(f": did you mean {SAME[name]}?")
        else:
            assert f"training.{name}" in PATHS, f"{config.__name__}.{name} has no answer"
            assert answer(name).endswith(f": did you mean training.{name}?")


def test_every_field_that_is_named_exists_and_every_reason_is_a_sentence():
    assert len(FOREIGN_NAMES) > 200
    for name, foreign in FOREIGN_NAMES.items():
        assert set(foreign.fields) <= set(PATHS), name
        assert foreign.fields or len(foreign.note.split()) >= 4, name
        assert not foreign.note.endswith("."), name
        assert f"training.{name}" not in PATHS, f"{name} is a field"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("loss_weights", "falign has none, because a run has one margin loss"),
        ("rpo_alpha", "falign has none, because a run has one margin loss"),
        ("ld_alpha", "falign has none, because objective.length_norm=token"),
        ("run_name", "falign has none, because trackers have environment variables"),
        ("deepspeed", "falign has none, because processes are chosen on the command line"),
        ("truncation_mode", "here it is data.long_prompt or data.long_completion."),
        ("epsilon", "here it is objective.clip_low (and objective.clip_high"),
        ("num_iterations", "here it is rollout.updates."),
        ("disable_dropout", "falign has none, because dropout of the model is always off"),
        ("eval_on_start", "falign has none, because held-out data are always evaluated before the first step"),
        ("num_generations", "here it is rollout.completions."),
        ("top_p", "falign has none, because completions are sampled from the whole vocabulary"),
        ("use_rslora", "here it is adapter.alpha (rsLoRA is an alpha that is √r times as large)."),
        ("dataset_num_proc", "falign has none, because tokens are in memory before the first step"),
        ("num_generation", "did you mean num_generations? Here it is rollout.completions."),
        ("epsilon_hi", "did you mean epsilon_high? Here it is objective.clip_high."),
        ("push_to_hubb", "did you mean push_to_hub? Falign has none, because falign uploads nothing"),
        ("max_completion_length", "here it is rollout.max_new_tokens or data.max_completion_length"),
    ],
)
def test_a_setting_is_sent_to_its_own_field(name, told):
    assert told in answer(name, "training")


@pytest.mark.parametrize("section", ["model", "adapter", "objective", "training", "rollout"])
def test_the_answer_is_the_same_in_every_section(section):
    assert answer("lora_alpha", section).endswith(": here it is adapter.alpha.")
