"""Every setting of the installed TRL, transformers and PEFT is answered with its field, or with the reason for none."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig

import falign
from falign.cli.launch import FLAGS, Launch
from falign.errors import NAMES, ConfigError
from falign.foreign.names import FOREIGN_NAMES
from falign.foreign.peft_rows import LORA_CONFIG
from falign.models import load_model
from falign.models.execution import disable_dropout
from falign.models.loading import _nf4
from falign.objectives.margins import get_margin_loss
from falign.runfile import parse_run
from falign.runfile.optimization import check_names
from falign.runfile.policy_config import AdapterConfig
from falign.runfile.policy_config import ModelConfig as FalignModel
from falign.runfile.reading import valid_paths
from falign.runfile.training_config import TrainingConfig

LEAST = {"output_dir": "run", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
PATHS = list(valid_paths())
SAME = {
    "attn_implementation": "model.attn_implementation",
    "alpha_pattern": "adapter.alpha_pattern",
    "beta": "objective.beta",
    "dtype": "model.dtype or reference.dtype",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "init_lora_weights": "adapter.init_lora_weights",
    "max_length": "data.max_length or prompts.max_length",
    "modules_to_save": "adapter.modules_to_save",
    "output_dir": "output_dir",
    "r": "adapter.r",
    "rank_pattern": "adapter.rank_pattern",
    "revision": "model.revision",
    "seed": "seed",
    "target_modules": "adapter.target_modules",
    "target_parameters": "adapter.target_parameters",
    "temperature": "rollout.temperature or objective.temperature or sampling.temperature",
    "trust_remote_code": "model.trust_remote_code",
    "use_dora": "adapter.use_dora",
    "use_rslora": "adapter.use_rslora",
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
            assert answer(name).endswith(FOREIGN_NAMES[name].message())
        elif name in SAME:
            assert answer(name, "unknown").endswith(f": did you mean {SAME[name]}?")
        else:
            assert f"training.{name}" in PATHS, f"{config.__name__}.{name} has no answer"
            assert answer(name).endswith(f": did you mean training.{name}?")


def test_every_field_that_is_named_exists_and_every_reason_is_a_sentence():
    assert len(FOREIGN_NAMES) > 200
    for name, foreign in FOREIGN_NAMES.items():
        assert {field.removesuffix(f".extra.{name}") for field in foreign.fields} <= set(PATHS), name
        assert foreign.fields or len(foreign.note.split()) >= 4, name
        assert not foreign.note.endswith("."), name
        assert f"training.{name}" not in PATHS, f"{name} is a field"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("loss_weights", "here it is objective.weights (with objective.kind=sum"),
        ("rpo_alpha", "here it is objective.terms (with objective.kind=sum"),
        ("ld_alpha", "falign has no such setting, because LD-DPO is not available"),
        ("run_name", "here it is training.extra.run_name (in the tracker alone)."),
        ("deepspeed", "falign has no such setting, because processes are chosen on the command line"),
        ("truncation_mode", "here it is data.long_prompt or data.long_completion."),
        ("epsilon", "here it is objective.clip_low (and objective.clip_high"),
        ("num_iterations", "here it is rollout.updates."),
        ("disable_dropout", "falign has no such setting, because dropout of the model is always off"),
        (
            "eval_on_start",
            "falign has no such setting, because held-out data are always evaluated before",
        ),
        ("num_generations", "here it is rollout.completions."),
        ("top_p", "falign has no such setting, because completions are sampled from the whole vocabulary"),
        ("lora_modules_to_save", "here it is adapter.modules_to_save."),
        ("dataset_num_proc", "here it is data.num_proc"),
        ("chat_template_kwargs", "here it is model.chat_template_kwargs"),
        ("num_generation", "did you mean num_generations? Here it is rollout.completions."),
        ("epsilon_hi", "did you mean epsilon_high? Here it is objective.clip_high."),
        ("push_to_hubb", "did you mean push_to_hub? Falign has no such setting, because training uploads nothing"),
        ("max_completion_length", "here it is rollout.max_new_tokens or data.max_completion_length"),
    ],
)
def test_a_setting_is_sent_to_its_own_field(name, told):
    assert told in answer(name, "training")


@pytest.mark.parametrize("section", ["model", "adapter", "objective", "training", "rollout"])
def test_the_answer_is_the_same_in_every_section(section):
    assert answer("lora_alpha", section).endswith(": here it is adapter.alpha.")


def test_whatever_a_reason_names_exists():
    sections = {path.partition(".")[0] for path in PATHS}
    for name, foreign in FOREIGN_NAMES.items():
        for path in re.findall(r"\b[a-z_]+\.[a-z_0-9.]+[a-z_0-9]", foreign.note):
            section = path.partition(".")[0]
            assert path in PATHS or section not in sections, (name, path)
        for command in re.findall(r"\bfalign (train|score|evaluate|export|sample|data)\b", foreign.note):
            assert (Path(falign.__file__).parent / "cli" / f"{command}.py").is_file()
        for page in re.findall(r"\bdocs/\S+\.md\b", foreign.note):
            assert (Path(__file__).parents[2] / page).is_file()
        for loss in re.findall(r"\b(?:robust|exo)\([\d.]+\)", foreign.note):
            assert get_margin_loss(loss)


def test_launching_is_answered_with_the_kinds_that_work():
    told = FOREIGN_NAMES["deepspeed"].message()
    assert {kind for kind in Launch if kind.value in told} == set(FLAGS)


def test_the_trainer_is_set_as_the_reasons_say(tmp_path):
    args = TrainingConfig().build(tmp_path, seed=0)
    expected = {
        **{"dataloader_num_workers": 0, "push_to_hub": False, "average_tokens_across_devices": True},
        **{"remove_unused_columns": False, "neftune_noise_alpha": None},
        **{"torch_compile": False, "auto_find_batch_size": False, "prediction_loss_only": False, "use_cpu": False},
        **{"logging_nan_inf_filter": False, "save_only_model": False, "disable_tqdm": True},
    }
    assert {name: getattr(args, name) for name in expected} == expected
    for name in expected.keys() - {"logging_nan_inf_filter"}:  # which has a field of another name
        assert not FOREIGN_NAMES[name].fields, name


def test_optimizers_that_need_target_modules_are_refused():
    for name in OptimizerNames:
        if name.value.startswith(("galore", "apollo")):
            with pytest.raises(ConfigError, match="it trains only chosen modules"):
                check_names(name.value, "linear")


def test_adapters_and_quantization_are_what_the_reasons_say():
    assert not {name for name, row in LORA_CONFIG.items() if not row.fields} & AdapterConfig.model_fields.keys()
    assert get_args(get_args(FalignModel.model_fields["quantization"].annotation)[0]) == ("nf4", "int8")
    config = _nf4()
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == torch.bfloat16
    assert "double quantization" in FOREIGN_NAMES["use_bnb_nested_quant"].note
    assert "bfloat16" in FOREIGN_NAMES["bnb_4bit_quant_storage"].note


def test_dropout_of_a_model_is_off(tiny):
    model = load_model(str(tiny)).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_only_exports_upload():
    uploads = {"push_to_hub", "upload_file", "upload_folder", "upload_large_folder", "create_repo", "create_commit"}
    package = Path(falign.__file__).parent
    for file in set(package.rglob("*.py")) - {package / "runs" / "publishing.py"}:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
        assert not names & uploads, file
