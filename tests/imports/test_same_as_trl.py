"""An imported configuration of TRL trains like TRL: the same losses at the first steps of full fine-tuning."""

import json
import math

import pytest
import yaml
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
)

from falign.imports import import_run
from falign.runfile import load_run_file
from falign.training import train
from tests.models.tiny import save_tiny
from tests.training.pairs import write_pairs

# TRL 1.16 and PEFT 0.21 read an attribute that Transformers 5.23 has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
ROWS = 8

BASE = {
    "dataset_name": "json",
    "per_device_train_batch_size": ROWS,  # all rows in a step, so that no order matters
    "max_steps": 3,
    "learning_rate": "1e-3",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
}
CONFIGS = {
    "alpha and sft": (
        "dpo",
        {
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.3,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 0.25],
            "beta": 0.3,
        },
    ),
    "ipo": ("dpo", {"loss_type": ["ipo"], "beta": 0.5, "weight_decay": 0.1}),
    "normalized": ("dpo", {"loss_type": ["sigmoid_norm"], "beta": 2.0, "optim": "adamw_torch"}),
    "robust, forward_kl": (
        "dpo",
        {"loss_type": ["robust"], "label_smoothing": 0.2, "f_divergence_type": "forward_kl", "learning_rate": 1e-5},
    ),
    "apo_zero": ("dpo", {"loss_type": ["apo_zero"], "beta": 0.2, "warmup_steps": 2, "lr_scheduler_type": "linear"}),
    "apo_zero_unpaired": ("kto", {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5, "beta": 0.7}),
    "sft": ("sft", {"adam_beta2": 0.95}),
}
TRAINERS = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer), "sft": (SFTConfig, SFTTrainer)}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def write_rows(command, path):
    write_pairs(path, ROWS)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if command != "dpo":
        labels = {"kto": {"label": True}, "sft": {}}[command]
        rows = [{"prompt": row["prompt"], "completion": row["chosen"], **labels} for row in rows]
        if command == "kto":
            rows = [{**row, "label": i % 3 != 0} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def losses_of_trl(command, file, data):
    """The losses of TRL's own trainer, made as its script makes it."""
    from datasets import load_dataset

    config, trainer_class = TRAINERS[command]
    parser = TrlParser((ScriptArguments, config, ModelConfig))
    _, args, model = parser.parse_args_and_config(["--config", str(file)])
    args.model_init_kwargs = {"dtype": model.dtype}
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=args,
        train_dataset=load_dataset("json", data_files=str(data), split="train", cache_dir=str(data.parent / "cache")),
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_losses_are_those_of_trl(name, tmp_path, tiny_model):
    command, settings = CONFIGS[name]
    data = write_rows(command, tmp_path / "rows.jsonl")
    settings = {**BASE, **settings, "model_name_or_path": str(tiny_model), "output_dir": str(tmp_path / "trl")}
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    theirs = losses_of_trl(command, file, data)

    run = import_run(
        "trl", {**settings, "dataset_name": str(data), "output_dir": str(tmp_path / "ours")}, method=command
    )
    (tmp_path / "run.yaml").write_text(run.text, encoding="utf-8")
    summary = train(load_run_file(tmp_path / "run.yaml"))
    ours = [line["loss"] for line in summary.folder.metrics() if "loss" in line]

    assert len(ours) == len(theirs) == 3
    assert ours == pytest.approx(theirs, abs=1e-5)
    if command == "dpo":
        assert not math.isclose(ours[0], ours[2], abs_tol=1e-3)  # the third follows from two updates
