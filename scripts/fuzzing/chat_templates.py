"""Rows under chat templates that change what they say, and real chat templates with mutations.

Either a row is refused by an error of falign's own, or its tokens, decoded, say what the row says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import mutations
from tests.models.tiny import save_tiny, tiny_tokenizer

Attempt = Callable[[Random], None]


def each(inner: str) -> str:
    return "{% for m in messages %}" + inner + "{% endfor %}"


OPENING = "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
TURN = "{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}"
OWN = {
    "plain": each(TURN) + OPENING,
    "trims": each("{{ '<s>' + m['role'] + ': ' + m['content'] | trim + '</s>' }}") + OPENING,
    "cuts reasoning": each("{{ '<s>' + m['role'] + ': ' + m['content'].split('</think>')[-1] + '</s>' }}") + OPENING,
    "drops system turns": each("{% if m['role'] != 'system' %}" + TURN + "{% endif %}") + OPENING,
    "lowers": each("{{ '<s>' + m['role'] + ': ' + m['content'] | lower + '</s>' }}") + OPENING,
    "repeats": each(TURN + TURN) + OPENING,
    "truncates": each("{{ '<s>' + m['role'] + ': ' + m['content'][:20] + '</s>' }}") + OPENING,
    "only the last turns": "{% for m in messages[-2:] %}" + TURN + "{% endfor %}" + OPENING,
    "refuses systems": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + each(TURN),
    "reads names": each("{{ '<s>' + m.role + (' ' + m.name if m.name else '') + ': ' + m.content + '</s>' }}"),
}
BUNDLED = (
    *("qwen3", "qwen3_training", "deepseekv3", "deepseek_r1_distill", "llama3", "llama3_1", "gemma3", "gptoss"),
    *("glm4moe", "phi3", "cohere2", "nemotron_3_nano"),
)
"""Of TRL: templates that cut reasoning, trim, refuse turns, or take all as it is."""

SNIPPETS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    *("{{ 'x' * 10**7 }}", "{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ unknown.x }}", "{{ 'x' | nothing }}"),
    *("{{ raise_exception('no') }}", "{% if %}", "{% endfor %}", "{{", "}}", "{%", "{#", "{{ range(10**9) | list }}"),
    *("{{ messages | tojson }}", "{{ messages[0].content }}", "{{ messages[0]['content'] + 3 }}", "{{ loop.last }}"),
    *("{% set messages = messages[1:] %}", "{% set messages = messages[:1] %}", "{% set m = {} %}", "{{ ''.x.y }}"),
    *("{{ [1,2] | random }}", "{% break %}", "{% include 'x' %}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    *("{{ strftime_now('%H') }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "</s>", "<s>", "\ud800"),
)
WORDS = ("content", "role", "messages", "message", "loop", "last", "trim", "user", "assistant", "system", "if", "not")


def bundled(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def templates() -> dict[str, str]:
    """Return the templates that rows are read under, by name."""
    return OWN | {name: bundled(name) for name in BUNDLED}


def conversation(random: Random) -> list[dict[str, Any]]:
    """Return the turns before an answer, each with words of its own."""
    number = iter(range(random.randrange(1000), 10_000))

    def content() -> str:
        words = [f"{random.choice(('Word', 'word', 'WORD'))}{next(number)}" for _ in range(random.choice((1, 2, 6)))]
        text = " ".join(words)
        return random.choice(
            (text, text, f" {text}\n", f"<think>\n{text}\n</think>\n\n{text[::-1]}", f"{text}?", "the")
        )

    turns = [{"role": "system", "content": content()}] if random.random() < 0.3 else []
    for _ in range(random.choice((0, 0, 1, 2))):
        turns += [{"role": "user", "content": content()}, {"role": "assistant", "content": content()}]
    turns.append({"role": "user", "content": content()})
    return turns


def row(random: Random) -> dict[str, Any]:
    """Return a pair, as likely as not with something wrong."""
    turns = conversation(random)
    reasoning = random.choice(("", "", "<think>because Y1</think>"))
    sides = {side: [{"role": "assistant", "content": f"{reasoning}{side.title()} {turns[-1]['content']}"}]
             for side in ("chosen", "rejected")}  # fmt: skip
    found: dict[str, Any] = {"prompt": turns, **sides}
    match random.choice(("as it is",) * 4 + ("mutated",) * 2 + ("key", "as text", "in full", "other name", "unused")):
        case "mutated":
            found = mutations.tree(random, found)
        case "key":
            random.choice(turns)[random.choice(("name", "weight", "reasoning_content"))] = random.choice(
                ("Z9", 1, None)
            )
        case "as text":
            found = {name: random.choice((repr, json.dumps))(value) for name, value in found.items()}
        case "in full":
            found = {side: [*turns, *sides[side]] for side in sides}
        case "other name":
            found[random.choice(("question", "messages", "context"))] = found.pop("prompt")
        case "unused":
            found[random.choice(("system_prompt", "note", "history", "id"))] = random.choice(("Some words X7", 3, None))
    return found if isinstance(found, dict) else {"prompt": found}


def rendered_rows(folder: Path) -> Attempt:
    """Rows that ``data check`` and ``train`` read under a template; both must say the same of every row."""
    from falign.data import DataSource, Window, check, load_preferences, read_examples
    from falign.data.reports import BadRows

    tokenizer, all_templates, window = tiny_tokenizer(), templates(), Window(4096)

    def attempt(random: Random) -> None:
        tokenizer.chat_template = all_templates[random.choice(sorted(all_templates))]
        file = folder / "rows.jsonl"
        rows = [row(random) for _ in range(6)]
        file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        source = DataSource(str(file), chat=True)
        options: dict[str, Any] = {"stop_token_ids": {1}, "window": window}
        checked, problem = outcome(lambda: check(source, tokenizer=tokenizer, keep=99, **options).source)
        first = problem if checked is None else next(iter(checked.messages), "")
        loaded, error = outcome(lambda: load_preferences([source], tokenizer, bad_rows="skip", **options))
        assert loaded is not None or first in error, (first, error)
        _, error = outcome(lambda: load_preferences([source], tokenizer, **options))
        assert bool(error) == bool(first), (first, error)
        assert first in error, (first, error)
        if loaded is None or checked is None:
            return
        report = loaded.report.sources[0]
        assert (checked.bad, checked.kept, checked.unused) == (report.bad, report.kept, report.unused)
        assert checked.messages[: len(report.messages)] == report.messages
        texts = {example.place: example for example in read_examples(source, bad_rows=BadRows("skip"))}
        for tree in loaded.train:
            example = texts[tree.place]
            for ids, answer in zip(tree.completion_ids, example.completions, strict=True):
                said = tokenizer.decode([*tree.prompt_ids, *ids])
                require_said([*example.prompt, *answer], said)

    return attempt


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """Return what is read and no message, or nothing and the message of falign's error."""
    from falign.errors import FalignError

    try:
        return read(), ""
    except FalignError as error:
        return None, str(error)


def require_said(turns: list[Any], text: str) -> None:
    """Assert that a text says all turns in order, each of their words as often as they do."""
    text, position = "".join(text.split()), 0
    for turn in turns:
        content = "".join(turn["content"].split())
        found = text.find(content, position)
        assert found >= 0, (turn, text)
        position = found + len(content)
    for word in {word for turn in turns for word in turn["content"].split() if any(map(str.isdigit, word))}:
        wanted = "".join("".join(turn["content"].split()) + "\n" for turn in turns).count(word)
        assert text.count(word) == wanted, (word, wanted, text)


def mutated(random: Random, template: str) -> str:
    """Return a template with one to three changes."""
    for _ in range(random.choice((1, 1, 2, 3))):
        start = random.randrange(len(template) + 1)
        stop = min(len(template), start + random.choice((1, 4, 20, 200)))
        match random.choice(("cut", "remove", "repeat", "snippet", "snippet", "word", "word", "sign", "move")):
            case "cut":
                template = template[:start]
            case "remove":
                template = template[:start] + template[stop:]
            case "repeat":
                template = template[:stop] + template[start:]
            case "snippet":
                template = template[:start] + random.choice(SNIPPETS) + template[start:]
            case "word":
                template = template.replace(random.choice(WORDS), random.choice(WORDS), random.choice((1, 2, -1)))
            case "sign":
                template = template[:start] + random.choice("{}%'\"|[]()-~+.:,\n\\\x00²") + template[start:]
            case _:
                template = template[stop:] + template[start:stop] + template[:start]
    return template


def chat_templates(folder: Path) -> Attempt:
    """Mutations of real chat templates, from a file as ``model.chat_template`` gives it."""
    from falign.data import DataSource, PromptSource, Window, load_preferences, load_prompts
    from falign.models import load_tokenizer

    all_templates = templates()
    save_tiny(folder / "model")

    def attempt(random: Random) -> None:
        file, rows = folder / "template.jinja", folder / "rows.jsonl"
        changed = mutated(random, all_templates[random.choice(sorted(all_templates))])
        file.write_text(changed, encoding="utf-8", errors="surrogatepass")
        turns = conversation(random)
        answers = {side: f"{side} {random.random()}" for side in ("chosen", "rejected")}
        sides = {side: [{"role": "assistant", "content": answer}] for side, answer in answers.items()}
        rows.write_text(json.dumps({"prompt": turns, **sides}) + "\n", encoding="utf-8")
        tokenizer = load_tokenizer(folder / "model", chat_template=file)
        source, window = DataSource(str(rows)), Window(100_000, 50_000)
        (tree,) = load_preferences([source], tokenizer, stop_token_ids={1}, window=window).train
        for ids, side in zip(tree.completion_ids, sides.values(), strict=True):
            require_said([*turns, *side], tokenizer.decode([*tree.prompt_ids, *ids]))
        (prompt,) = load_prompts([PromptSource(str(rows))], tokenizer, max_length=100_000).train
        require_said(turns, tokenizer.decode(prompt.prompt_ids))

    return attempt
