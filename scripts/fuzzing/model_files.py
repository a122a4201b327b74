"""Folders of models and checkpoints whose configuration, tokenizer settings or checksums are spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzzing import mutations
from fuzzing.weights import fresh, spoil_one_file, trained_run
from tests.models.tiny import save_tiny

Attempt = Callable[[Random], None]

IDS = (5, 70, 81, 82, 0, 9, 90, 255, 1)
TEXTS = ("Hello, wörld 42!</s> <s>x", "  two  spaces\n", "<unk><x>")
TURNS = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."})


class SilentChangeError(AssertionError):
    """A spoilt file was taken, computes something else, and has the identity of the original."""


def change_plausibly(random: Random, file: Path) -> None:
    """Give one or two fields of a JSON file another value of their own type, as an edit or another version would."""
    content = json.loads(file.read_text())
    for _ in range(random.choice((1, 1, 2))):
        container, key = random.choice([place for place in mutations.places(content) if isinstance(place[0], dict)])
        old = container[key]
        if isinstance(old, bool):
            container[key] = not old
        elif isinstance(old, int):
            container[key] = random.choice((old + 1, old - 1, 2 * old, old // 2, 0, old * 10**6))
        elif isinstance(old, float):
            container[key] = random.choice((2 * old, old / 3, 10 * old, 0.0, -old, old * 1e9))
        elif old is None:
            container[key] = random.choice((1, 0.5, True, 2, "default"))
        elif isinstance(old, str):
            container[key] = random.choice(
                ("relu", "silu", "gelu", "gelu_new", "linear", "yarn", "dynamic", "llama", old)
            )
        else:
            container.pop(key)
    file.write_text(json.dumps(content))


def configurations(folder: Path) -> Attempt:
    """A spoilt ``config.json``: refused, or of another identity if it computes something else."""
    from falign.models import load_model, model_identity
    from falign.scoring import check_head

    bases = {kind: save_tiny(folder / kind, kind) for kind in ("llama", "qwen2", "gpt2")}

    def computes(path: Path) -> tuple[dict[str, str], Any]:
        model = load_model(path)
        check_head(model, IDS)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([IDS]), use_cache=False).logits
        return model_identity(model), logits

    originals = {kind: computes(base) for kind, base in bases.items()}

    def attempt(random: Random) -> None:
        kind = random.choice(sorted(bases))
        copy = fresh(bases[kind], folder / "spoilt")
        if random.random() < 0.6:
            change_plausibly(random, copy / "config.json")
        else:
            spoil_one_file(random, copy, only=("config.json",))
        identity, logits = computes(copy)
        known, expected = originals[kind]
        if identity == known and not torch.equal(logits, expected):
            raise SilentChangeError(f"{(copy / 'config.json').read_text()[:300]} changes logits, and no hash")

    return attempt


def tokenizer_settings(folder: Path) -> Attempt:
    """A spoilt ``tokenizer_config.json``: refused, or of another fingerprint if it encodes anything else."""
    from falign.models import load_tokenizer
    from falign.models.tokenizers import tokenizer_fingerprint

    base = save_tiny(folder / "base")

    def encodes(path: Path) -> tuple[str, Any]:
        tokenizer = load_tokenizer(path)
        ids = [tokenizer(text).input_ids for text in TEXTS]
        turns = tokenizer.apply_chat_template(list(TURNS), tokenize=False) if tokenizer.chat_template else None
        return tokenizer_fingerprint(tokenizer), (ids, turns, tokenizer.eos_token_id)

    original = encodes(base)

    def attempt(random: Random) -> None:
        copy = fresh(base, folder / "spoilt")
        if random.random() < 0.5:
            change_plausibly(random, copy / "tokenizer_config.json")
        else:
            spoil_one_file(random, copy, only=("tokenizer_config.json",))
        fingerprint, encoded = encodes(copy)
        if fingerprint == original[0] and encoded != original[1]:
            raise SilentChangeError(f"{(copy / 'tokenizer_config.json').read_text()[:300]} changes ids, and no hash")

    return attempt


def checksums(folder: Path) -> Attempt:
    """A spoilt ``checksums.json`` beside a flipped bit: the checkpoint is never taken for whole."""
    from falign.runs.checkpoints import newest_undamaged

    run, _ = trained_run(folder, 0, save_steps=2, save_total_limit=1)
    checkpoint = max(run.glob("checkpoint-*"))

    def attempt(random: Random) -> None:
        copy = fresh(checkpoint, folder / "spoilt" / checkpoint.name)
        spoil_one_file(random, copy, only=("checksums.json",))
        file = random.choice(sorted(file for file in copy.rglob("*") if file.is_file() and file.stat().st_size))
        if file.name != "checksums.json":
            content = bytearray(file.read_bytes())
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            file.write_bytes(content)
        taken = newest_undamaged(copy.parent, tell=lambda text: None)
        if taken is not None and file.name != "checksums.json":
            raise SilentChangeError(f"{file.name} has a flipped bit, and the checkpoint was taken for whole")

    return attempt
