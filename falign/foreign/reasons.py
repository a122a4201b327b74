"""Reasons that several rows give for a setting without a field."""

from __future__ import annotations

__all__ = [
    "CLIPPING",
    "COMPILE",
    "DPO_LOSS",
    "ENTROPY",
    "HUB",
    "INT8",
    "LOADER",
    "LOGGING",
    "LORA",
    "METRICS",
    "SAMPLING",
    "SAVING",
    "SERVER",
    "SHARDING",
]

SAMPLING = "completions are sampled from the whole vocabulary; importance weights cannot correct for tokens left out"
SERVER = "it is an option of the vLLM server, which you start yourself (docs/vllm.md)"
SHARDING = "processes are chosen on the command line: falign train RUN.yaml --launch ddp, or --launch fsdp2"
HUB = "training uploads nothing: falign export RUN --push NAME does, afterwards"
INT8 = "8-bit weights are multiplied in the type of the others here; LLM.int8() there also rounds the inputs."
LOADER = "all rows are tokenized before the first step, and the training process makes the batches"
ENTROPY = "no objective has an entropy bonus; objective.divergence and objective.beta limit the change of the policy"
CLIPPING = "no objective clips in this way; objective.clip_low and objective.clip_high bound π/π_old"
METRICS = "held-out metrics are means over all rows, written to metrics.jsonl"
LOGGING = "falign prints its own messages and writes all metrics to metrics.jsonl"
LORA = "adapters are LoRA or DoRA, with the fields of the section adapter"
DPO_LOSS = "no objective has this loss; objective.margin_loss has those of the margin between two completions"
SAVING = "training.save_steps writes whole checkpoints, from which --resume continues"
COMPILE = "batches of ever new lengths would be compiled again and again"
