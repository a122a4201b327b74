"""Trains in one of several processes, or alone: the trainers inside TRL; writes weights and logs."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, KTOConfig

import falign
from falign.integrations.trl import FDPOTrainer, FKTOTrainer
from falign.methods import KTO
from falign.models import add_lora
from falign.objectives import Selected, Sum, Supervised
from falign.references import MovingAverage
from tests.models.tiny import fill_adapter, tiny_model

OBJECTIVES = {
    "pairs": (FDPOTrainer, DPOConfig, lambda: Sum(
        {"dpo": falign.FDPO("js_divergence", 0.4), "sft": (Selected(Supervised(), "chosen"), 0.3)}
    )),
    "labels": (FKTOTrainer, KTOConfig, lambda: KTO("reverse_kl", 0.4)),
}  # fmt: skip


def rows(kind):
    pairs = [
        {"prompt": f"Name color {i}.", "chosen": " Blue" * (1 + i % 3), "rejected": " no" * (1 + i % 2)}
        for i in range(8)
    ]
    if kind == "pairs":
        return Dataset.from_list(pairs)
    return Dataset.from_list(
        [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for side in ("chosen", "rejected")
            for pair in pairs
        ]
    )


def run(case, folder, batch, path):
    kind, layout = case["kind"], case["layout"]
    cls, config, objective = OBJECTIVES[kind]
    tokenizer = AutoTokenizer.from_pretrained(path)
    args = config(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        max_steps=2,
        learning_rate=1e-2,
        optim="sgd",  # Adam divides rounding errors of tiny gradients by themselves
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    torch.manual_seed(0)
    trainer = cls(
        fill_adapter(add_lora(tiny_model("llama"), r=4, alpha=8, seed=0)),
        args=args,
        train_dataset=rows(kind),
        processing_class=tokenizer,
        objective=objective(),
        layout=layout,
        reference=MovingAverage(alpha=0.5, every=1),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}
        torch.save(weights, folder / f"{kind}-{layout}.pt")
        (folder / f"{kind}-{layout}.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    for each in plan["cases"]:
        run(each, Path(plan["folder"]), plan["batch"], plan["tokenizer"])
