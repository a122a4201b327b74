"""What a run would do, as plain values: all that is built for it, and none of its run file."""

import functools
import hashlib
import io
import re
import types
from enum import Enum
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments

from falign.runfile.base_config import FrozenModel
from falign.training.offline import offline_trainer
from falign.training.online.run import online_trainer
from falign.training.parts import load_language
from falign.training.run import _answers

PLAIN = (type(None), bool, int, str, bytes, Path, torch.dtype, torch.device, range)
OF_THE_TRAINER = (
    *("policy", "reference", "objective", "measures", "args", "scorer", "tokens_per_batch"),
    *("train_dataset", "eval_dataset", "rehearsal", "rehearsal_size", "prompts", "eval_prompts"),
    *("value_head", "warm_up", "sampler", "evaluation_sampler", "guard", "max_gap", "correction", "course", "table"),
    "master_weights",
)
NOT_MADE_HERE = ("hook", "forward", "hf_device_map")
DRAWN = re.compile(r"falign-[0-9a-f]{8}")  # of folders that have a new name each time


def describe(value, seen=None):
    """Plain values that differ where what they describe does; sections of a run file in it are left out."""
    seen = {} if seen is None else seen
    if isinstance(value, PLAIN):
        if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
            return DRAWN.sub("*", str(value))
        return str(value) if isinstance(value, range | torch.dtype | torch.device | bytes) else value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, FrozenModel):
        return "a section"
    if isinstance(value, Console):
        return "a console"  # what it has shown so far is in it
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8) if value.numel() else value
        digest = hashlib.sha256(content.numpy().tobytes()).hexdigest()[:16]
        return [str(value.dtype), list(value.shape), digest, value.requires_grad]
    if id(value) in seen:
        return f"as {seen[id(value)][0]}"
    seen[id(value)] = len(seen), value  # kept alive, or a later value could have its id
    return _inside(value, seen)


def _inside(value, seen):
    if isinstance(value, dict | types.MappingProxyType):
        return {str(key): describe(inner, seen) for key, inner in value.items() if not _is_left_out(key)}
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [describe(inner, seen) for inner in value]
    if isinstance(value, TrainingArguments):
        return describe(value.to_dict(), seen)
    if isinstance(value, PreTrainedTokenizerBase):
        return [len(value), value.chat_template]
    if isinstance(value, torch.Generator):
        return value.initial_seed()
    if isinstance(value, functools.partial):
        return [describe(part, seen) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return [value.__func__.__qualname__, describe(value.__self__, seen)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [f"{value.__module__}.{value.__qualname__}", describe(cells, seen), describe(value.__defaults__, seen)]
    slots = [getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
    return [type(value).__qualname__, describe(getattr(value, "__dict__", {}), seen), describe(slots, seen)]


def _is_left_out(key):
    return any(part in str(key) for part in NOT_MADE_HERE)


def plan(config):
    """Return all that is built for a run, its first batches, what it samples and evaluates, and what it answers."""
    objective, console = config.check(), Console(file=io.StringIO(), width=400)
    language = load_language(config)
    online = config.prompts is not None
    assemble = online_trainer if online else offline_trainer
    trainer, data = assemble(config, language, objective, callbacks=[], console=console)
    seen = {}
    built = {name: describe(getattr(trainer, name, None), seen) for name in OF_THE_TRAINER}
    torch.manual_seed(0)
    trainer._tr_loss = torch.zeros(())  # the loop has it, which does not run here
    if online:
        config.output_dir.mkdir(exist_ok=True)
        trainer.table.path.unlink(missing_ok=True)
        steps = trainer.args.gradient_accumulation_steps
        batches = []
        for trainer.state.global_step in range(2):
            batches += trainer.get_batch_samples(None, steps, torch.device("cpu"))[0]
    else:
        batches = list(trainer.get_train_dataloader())
    means = trainer.means.take()
    evaluated = trainer.evaluate() if trainer.evaluates else {}
    return {
        "language": describe(language),
        "built": built,
        "data": describe(data.report),
        "batches": describe(batches),
        "means": describe(means),
        "evaluated": describe(evaluated),
        "table": trainer.table.path.read_text() if online else "",
        "answers": _answers(config, trainer, language),
        "title": config.objective.title,
    }


__all__ = ["describe", "plan"]
