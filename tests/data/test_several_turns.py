"""Comparisons of several turns and of tool calls: only what the assistant writes counts, under the templates in use.

The oracle looks for the literal header and end of each assistant turn in the rendered text, and knows nothing of turns.
"""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from falign.data import DataSource, Window, encode, load_preferences
from falign.data.chat_template import TemplateInputs
from falign.data.examples import build_example
from falign.data.files import Row
from falign.data.recognition import RowReader
from falign.errors import DataError
from falign.scoring import completion_scores, pack, pad
from tests.scoring.models import tiny_model


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def call(name, /, **arguments):
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Look up the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city."},
                    "days": {"type": "integer", "description": "How many days."},
                },
                "required": ["city"],
            },
        },
    },
)
RESULT = {"role": "tool", "content": "Rain, 5 degrees.", "tool_call_id": "call00001", "name": "get_weather"}
PAIRS = {
    # The sides differ from the first answer on, and have unequal numbers of turns.
    "dialogue": (
        [user("Name a color.")],
        [assistant("Blue."), user("Another one?"), assistant("Green, gladly.")],
        [assistant("A table."), user("No, a color?"), assistant("Chair."), user("Hm."), assistant("Red.")],
    ),
    "tools": (
        [user("Is it dry in Oslo?")],
        [assistant("", tool_calls=[call("get_weather", city="Oslo", days=3)]), RESULT, assistant("No, it rains.")],
        [assistant("Yes, it is. ")],
    ),
}


class Family(NamedTuple):
    """What stands before and behind an assistant turn, literally; `closing` is the stop token, and is written last."""

    opening: str
    closing: str
    tools: bool = False


CHATML = "<|im_start|>assistant\n"
FAMILIES = {
    "qwen2_5": Family(CHATML, "<|im_end|>", tools=True),
    "qwen3": Family(CHATML, "<|im_end|>", tools=True),
    "llama3_1": Family("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", tools=True),
    "gemma3": Family("<start_of_turn>model\n", "<end_of_turn>"),
    "phi3_5": Family("<|assistant|>\n", "<|end|>"),
    "deepseekv3": Family("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "cohere2": Family("<|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"),
    "lfm2_v2": Family(CHATML, "<|im_end|>", tools=True),
    "nemotron_3_nano": Family("<|im_start|>assistant\n<think>", "<|im_end|>", tools=True),
    "qwen3_instruct_2507": Family(CHATML, "<|im_end|>", tools=True),
    "llama3": Family("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "smollm2": Family(CHATML, "<|im_end|>"),
}
CASES = [(name, pair) for name, family in FAMILIES.items() for pair in PAIRS if pair == "dialogue" or family.tools]


def template_of(name, smollm2):
    if name == "smollm2":
        return smollm2.chat_template
    package = importlib.util.find_spec("trl")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this TRL has no template {name}")
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer_of(byte_bpe, smollm2):
    def make(name):
        template = template_of(name, smollm2)
        found = re.findall(r"<[|｜][^<>]*[|｜]>", template)
        special = sorted({"<s>", "<think>", "</think>", FAMILIES[name].closing, *found})
        special += ["<start_of_turn>"] if name == "gemma3" else []
        return byte_bpe(special_tokens=special, eos=FAMILIES[name].closing, chat_template=template)

    return make


def by_literals(text, family, start, tokenizer):
    """Which tokens of a text lie between an opening and its closing, from a character on."""
    inside = [False] * (len(text) + 1)
    # The first answer follows the prompt, whose end has the first opening.
    for match in re.finditer(f"{re.escape(family.opening)}(.*?{re.escape(family.closing)})", text, flags=re.DOTALL):
        if match.start(1) >= start:
            inside[match.start(1) : match.end(1)] = [True] * (match.end(1) - match.start(1))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [inside[first] for first, _ in encoded["offset_mapping"]]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=700, max_position_embeddings=2048).eval().double()


@pytest.mark.parametrize(("name", "pair"), CASES)
def test_what_counts_is_what_the_assistant_writes_and_trees_equal_padded_rows(name, pair, tokenizer_of, model):
    prompt, *sides = PAIRS[pair]
    inputs = TemplateInputs(TOOLS) if pair == "tools" else TemplateInputs()
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    built = build_example("x:1", prompt=prompt, completions=sides, preference=(1.0, 0.0), fields=["chosen", "rejected"])
    tree = encode(replace(built, inputs=inputs), tokenizer, stop_token_ids=()).tree
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **inputs.arguments())
    expected = []
    for number, turns in enumerate(sides):
        text = tokenizer.apply_chat_template([*prompt, *turns], tokenize=False, **inputs.arguments())
        start = len(prefix(before, text))
        ids, counts = by_literals(text, family, start, tokenizer)
        # Nothing after the last closing is part of the completion.
        end = max(i for i, each in enumerate(counts) if each) + 1
        assert (*tree.prompt_ids, *tree.completion_ids[number]) == tuple(ids[:end])
        assert counts[len(tree.prompt_ids) : end] == list(tree.counted[number]), text
        decoded = tokenizer.decode(tree.counted_ids[number])
        for turn in turns:
            wanted = turn["role"] == "assistant"
            assert (turn["content"].strip() in decoded) == wanted or not turn["content"]
            assert all(part in decoded for part in ("get_weather", "Oslo", "3") if "tool_calls" in turn)
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids[:end]])).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(-1, torch.tensor(ids[1:end])[:, None])[:, 0]
        expected.append(taken[torch.tensor(counts[1:end])])
    for layout in (pack, pad):
        with torch.no_grad():
            scores = completion_scores(model, layout([tree], pad_token_id=0)).logprobs
        for row, own in zip(scores, expected, strict=True):
            torch.testing.assert_close(row[: len(own)], own, rtol=0, atol=1e-6)
            assert not row[len(own) :].any()


def prefix(first, second):
    return first[: next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))]


def test_sides_that_differ_in_a_users_turn_share_an_answer_that_does_not_count(tokenizer_of):
    common = [user("Name a color."), assistant("Blue.")]
    row = {
        "chosen": [*common, user("A warm one?"), assistant("Red.")],
        "rejected": [*common, user("Warmer?"), assistant("Ice.")],
    }
    example = RowReader().read(Row("x:1", row))
    assert (example.prompt, example.shared) == (common[:1], 1)
    tokenizer = tokenizer_of("qwen2_5")
    tree = encode(example, tokenizer, stop_token_ids=()).tree
    assert [tokenizer.decode(ids) for ids in tree.counted_ids] == ["Red.<|im_end|>", "Ice.<|im_end|>"]


REFUSED = {
    "two answers in a row": (
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b"), assistant("c")]},
        r"'rejected' has two answers one after the other \('b', 'c'\); give several answers as a list",
    ),
    "a question after the prompt's": (
        {"prompt": "q", "chosen": [user("x"), assistant("a")], "rejected": [assistant("b")]},
        "'chosen' goes on with a turn by 'user' after the prompt's last one",
    ),
    "calls of a user": (
        {"prompt": [{**user("q"), "tool_calls": [call("f")]}], "chosen": "a", "rejected": "b"},
        r"'prompt\[0\]' has tool calls in a turn by 'user'",
    ),
    "arguments that are not JSON": (
        {"prompt": "q", "chosen": [assistant("", tool_calls=[{"name": "f", "arguments": "{a"}])], "rejected": "b"},
        r"'tool_calls\[0\]' of 'chosen\[0\]' has arguments that are not JSON",
    ),
    "a call without a name": (
        {"prompt": "q", "chosen": [assistant("", tool_calls=[{"function": {}}])], "rejected": "b"},
        r"'tool_calls\[0\]' of 'chosen\[0\]' is .*; it must be \{'type': 'function'",
    ),
    "tools as text": (
        {"prompt": [user("q")], "chosen": "a", "rejected": "b", "tools": "get_weather"},
        "'tools' is text that is not JSON",
    ),
    "tools of plain texts": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "tools": list(TOOLS)},
        r"plain texts, which no template renders; set chat=True, or ignore=\[tools\]",
    ),
    "an option that falign sets": (
        {"prompt": [user("q")], "chosen": "a", "rejected": "b", "chat_template_kwargs": {"tokenize": True}},
        "'chat_template_kwargs' has 'tokenize', which falign itself sets",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_cannot_be_read_say_why(name):
    fields, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        RowReader().read(Row("x:1", fields))


LEFT_OUT = {
    "tools": ("smollm2", {"tools": list(TOOLS)}, "leaves out 'get_weather' of the column 'tools'"),
    "options": ("qwen2_5", {"chat_template_kwargs": {"enable_thinking": True}}, "'enable_thinking', which the chat"),
    "calls": (
        "lfm2",
        {"chosen": [assistant("x", tool_calls=[call("f", a=1)]), RESULT, assistant("a")]},
        "leaves out 'f' of turn 2|has the key 'tool_calls'",
    ),
    "reasoning": ("qwen2_5", {"chosen": [assistant("a", reasoning_content="why")]}, "has the key 'reasoning_content'"),
    "earlier reasoning": (
        "qwen3",
        {"chosen": [assistant("a", reasoning_content="why"), user("?"), assistant("c")]},
        "has the key 'reasoning_content'",
    ),
    "one of two thoughts": (
        "qwen3",
        {
            "chosen": [
                assistant("a", reasoning_content="why"),
                user("?"),
                assistant("c", reasoning_content="how"),
            ]
        },
        "leaves out 'why' of turn 2",
    ),
    "unknown fields": ("qwen3", {"chosen": [assistant("a", thoughts="why")]}, r"'thoughts' .*; remove it, set ignore"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused_by_name(name, tokenizer_of):
    family, changes, message = LEFT_OUT[name]
    FAMILIES.setdefault("lfm2", Family(CHATML, "<|im_end|>"))
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], **changes}
    with pytest.raises(DataError, match=message):
        encode(RowReader().read(Row("x:1", row)), tokenizer_of(family), stop_token_ids=())


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_a_reasoning_field_is_trained_on_where_the_template_writes_it(tokenizer_of, field):
    row = {"prompt": [user("q")], "chosen": [assistant("a", **{field: "Because."})], "rejected": [assistant("b")]}
    tokenizer = tokenizer_of("qwen3")
    tree = encode(RowReader().read(Row("x:1", row)), tokenizer, stop_token_ids=()).tree
    assert tokenizer.decode(tree.completion_ids[0]) == "<think>\nBecause.\n</think>\n\na<|im_end|>"


def test_reasoning_tools_and_options_reach_the_template(tokenizer_of, write_rows):
    row = {
        "prompt": [user("Dry?")],
        "chosen": [assistant("No.", reasoning_content="It rains.")],
        "rejected": [assistant("Yes.")],
        "tools": str([dict(TOOLS[0])]).replace("'", '"'),
        "chat_template_kwargs": '{"enable_thinking": false}',
    }
    tokenizer = tokenizer_of("qwen3")
    source = DataSource(write_rows(row))
    (tree,) = load_preferences([source], tokenizer, stop_token_ids=(), window=Window(2000)).train
    prompt, chosen = tokenizer.decode(tree.prompt_ids), tokenizer.decode(tree.completion_ids[0])
    assert "Look up the weather of a city." in prompt
    assert "It rains." in chosen
    # enable_thinking=false writes an empty thought into the generation prompt, which the reasoning replaces.
    bare = {name: value for name, value in row.items() if name != "chat_template_kwargs"}
    (other,) = load_preferences([DataSource(write_rows(bare))], tokenizer, stop_token_ids=(), window=Window(2000)).train
    assert (*tree.prompt_ids, *tree.completion_ids[0]) == (*other.prompt_ids, *other.completion_ids[0])


def test_a_cut_keeps_what_counts_and_drops_a_completion_of_which_nothing_is_left(tokenizer_of, write_rows):
    prompt, chosen, rejected = PAIRS["dialogue"]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    tokenizer = tokenizer_of("qwen2_5")
    source = DataSource(write_rows(row))
    (whole,) = load_preferences([source], tokenizer, stop_token_ids=(), window=Window(2000)).train
    length = len(whole.prompt_ids) + 20
    window = Window(length, max_completion_length=20)
    (cut,) = load_preferences([source], tokenizer, stop_token_ids=(), window=window).train
    assert cut.completion_ids == tuple(ids[:20] for ids in whole.completion_ids)
    assert cut.counted == tuple(own[:20] for own in whole.counted)


@pytest.mark.parametrize("argument", [{"id": 7}, {"type": "rain"}, {"name": "Ann"}, {"deep": {"at": [1, None, False]}}])
def test_every_argument_of_a_call_must_be_written_whatever_its_name(byte_bpe, argument):
    row = {"prompt": [user("q")], "chosen": [assistant("", tool_calls=[call("f", **argument)])], "rejected": "b"}
    example = RowReader().read(Row("x:1", row))

    def template(arguments):
        written = "{{ c.function.name }}({{ " + arguments + " | tojson }})"
        turn = "{{ m.role + m.content }}{% for c in m.tool_calls or [] %}" + written + "{% endfor %}</s>"
        return "{% for m in messages %}" + turn + "{% endfor %}"

    tree = encode(example, byte_bpe(chat_template=template("c.function.arguments")), stop_token_ids=()).tree
    assert len(tree.completion_ids) == 2
    name = next(iter(argument))
    inner = "c.function.arguments.keys() | list" if name != "deep" else "c.function.arguments.deep.at[:2]"
    with pytest.raises(DataError, match=r"the chat template (leaves out|changes)"):
        encode(example, byte_bpe(chat_template=template(inner)), stop_token_ids=())
