"""What is trained on is what the row says: A1 to A7, A9, C21, E3, F4 and the first two rows of the first hour."""

import csv
import io
import json
from pathlib import Path

import pytest
import trl

from falign.data import (
    DataSource,
    PromptSource,
    Row,
    RowReader,
    Window,
    check,
    demonstrations,
    encode,
    load_preferences,
    load_prompts,
    read_examples,
)
from falign.errors import ConfigError, DataError
from tests.models.tiny import tiny_tokenizer

WIDE = Window(10_000)
TURN = "{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}"
CUTTING = "{% for m in messages %}{% set c = m['content'].split('</think>')[-1] %}{{ '<s>' + c + '</s>' }}{% endfor %}"
BUNDLED = Path(trl.__file__).parent / "chat_templates"


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def each(inner):
    return "{% for m in messages %}" + inner + "{% endfor %}"


CHAT = each("{{ '<s>' + m['role'] + m['content'] + '</s>' }}") + (
    "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_of():
    def build(template=CHAT):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    return build


@pytest.fixture
def write(tmp_path):
    def build(*rows, name="rows.jsonl"):
        path = tmp_path / name
        if name.endswith(".csv"):
            text = io.StringIO()
            writer = csv.DictWriter(text, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
            path.write_text(text.getvalue())
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return build


def load(tokenizer, *sources, **options):
    return load_preferences(sources, tokenizer, stop_token_ids={1}, window=WIDE, **options)


def texts(tokenizer, tree):
    return tokenizer.decode(tree.prompt_ids), [tokenizer.decode(ids) for ids in tree.completion_ids]


# A1


@pytest.mark.parametrize("written", [repr, json.dumps, lambda turns: f" {json.dumps(turns, indent=1)}\n"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_conversation_written_as_text_is_read_as_a_conversation(tokenizer_of, write, written, name):
    sides = {side: written([user("Q0 isn't it?"), assistant(f"the {side} one")]) for side in ("chosen", "rejected")}
    tokenizer = tokenizer_of()
    (tree,) = load(tokenizer, DataSource(write(sides, name=name))).train
    assert texts(tokenizer, tree) == (
        "<s>userQ0 isn't it?</s><s>assistant",
        ["the chosen one</s>", "the rejected one</s>"],
    )
    whole = {"prompt": written([user("Q")]), "chosen": written([assistant("a")]), "rejected": written(assistant("b"))}
    (tree,) = load(tokenizer, DataSource(write(whole, name=name))).train
    assert texts(tokenizer, tree)[1] == ["a</s>", "b</s>"]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": repr([user("q"), assistant("a")])}, "completion"),
        ({"prompt": "q ", "completions": "['a', 'b']", "scores": "[1, 2]"}, "ranked"),
        ({"conversations": repr([user("q")]), "chosen": "a", "rejected": "b"}, "sharegpt"),
        ({"instruction": "q", "history": "[['x', 'y']]", "chosen": "a", "rejected": "b"}, "alpaca"),
    ],
)
def test_lists_written_as_text_are_read_in_every_layout(row, format):
    reader = RowReader()
    example = reader.read(Row("x:1", row))
    assert reader.format == format
    assert "a" in str(example.completions)
    assert "[" not in "".join(turn["content"] for turn in example.prompt if not isinstance(turn, str))


def test_a_conversation_that_cannot_be_parsed_is_a_bad_row():
    broken = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"  # as numpy prints it
    for fields in ({"chosen": broken, "rejected": broken}, {"prompt": broken, "chosen": "a", "rejected": "b"}):
        with pytest.raises(DataError, match="is a conversation written as text that is neither JSON nor a Python list"):
            RowReader().read(Row("x:1", fields))
    code = '{"role": "admin", "name": "x"}'  # an answer that is JSON stays an answer
    assert RowReader().read(Row("x:1", {"prompt": "q", "chosen": code, "rejected": "b"})).completions == (code, "b")


def test_prompts_read_conversations_written_as_text_and_templates_refuse_them(tokenizer_of, write):
    path = write({"prompt": repr([user("q")]), "answer": 1})
    (row,) = load_prompts([PromptSource(path)], tokenizer_of(), max_length=99).train
    assert row.prompt == [user("q")]
    for value in (repr([user("q")]), [user("q")], None):
        with pytest.raises(DataError, match=r"the template .* asks for 'prompt', which is"):
            load_prompts([PromptSource(write({"prompt": value}), template="{prompt}?")], tokenizer_of(), max_length=99)


# A2, first hour 2


NAMES = (
    *("context", "conversation", "dialogue", "history", "text", "user", "human", "inputs", "Question", "PROMPT"),
    *("messages", "userMessage", "query"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_under_another_name_is_refused_with_the_column(name):
    value = [user("What is 2 + 2?")] if name == "messages" else "What is 2 + 2?"
    row = Row("x:1", {name: value, "chosen": "The answer is 4.", "rejected": "The answer is 5."})
    with pytest.raises(DataError, match=rf"x:1: .*'{name}' looks like one; set columns=\{{prompt: {name}\}}"):
        RowReader().read(row)
    example = RowReader(columns={"prompt": name}).read(row)
    assert "2 + 2" in str(example.prompt)
    named = {"frage": "Was ist 2 + 2?", "chosen": "The answer is 4.", "rejected": "The answer is 5."}
    with pytest.raises(DataError, match=r"'frage' holds text; set columns=\{prompt: frage\}"):
        RowReader().read(Row("x:1", named))


def test_no_wrong_column_is_suggested_and_all_of_them_are_at_once():
    row = {"user_message": "q", "answer_good": "a", "answer_bad": "b", "system_prompt": "Be kind."}
    want = r"columns=\{prompt: user_message, chosen: answer_good, rejected: answer_bad, system: system_prompt\}"
    with pytest.raises(DataError, match=want):
        RowReader().read(Row("x:1", row))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "system_prompt"}, r"'user_message' looks like the prompt, .* set columns=\{prompt: user_message\}"),
        ({"prompt": "user_message"}, r"'system_prompt' looks like a system turn .*columns=\{system: system_prompt\}"),
    ],
)
def test_a_part_of_the_prompt_is_read_or_refused_or_ignored(columns, message):
    fields = {"user_message": "the question", "chosen": "a", "rejected": "b", "system_prompt": "Be kind."}
    with pytest.raises(DataError, match=message):
        RowReader(columns=columns).read(Row("x:1", fields))
    both = {"prompt": "user_message", "system": "system_prompt"}
    example = RowReader(columns=both).read(Row("x:1", fields))
    assert [turn["content"] for turn in example.prompt] == ["Be kind.", "the question"]
    reader = RowReader(columns=columns, ignore=["user_message", "system_prompt"])
    assert reader.read(Row("x:1", {**fields, "id": 3})).prompt == fields[columns["prompt"]]
    assert reader.unused == ("id",)


def test_a_column_that_says_again_what_is_read_is_no_missing_part():
    turns = [user("the question"), assistant("a")]
    fields = {"prompt": "the question", "messages": turns, "chosen": turns, "rejected": [turns[0], assistant("b")]}
    assert RowReader().read(Row("x:1", fields)).prompt == turns[:1]


def test_check_and_train_tell_unused_columns_and_a_prompt_that_never_changes(tokenizer_of, write):
    path = write(*({"prompt": "Be kind.", "chosen": f"a{i}", "rejected": f"b{i}", "note": "x"} for i in range(30)))
    want = ["30 rows have 1 distinct prompt", "unused columns: note"]
    source = DataSource(path, chat=True)
    assert check(source, tokenizer=tokenizer_of(), stop_token_ids={1}).source.remarks() == want
    told = [notice.text for notice in load(tokenizer_of(), source).report.notices()]
    assert told[1:] == [f"data: {path}: {remark}" for remark in want]


# A3


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
@pytest.mark.parametrize("repeats", [True, False])
def test_dialogues_equal_up_to_the_last_turn_have_the_common_turns_as_prompt(system, repeats):
    first = [user("q1")]
    middle = [assistant("a1"), user("q2"), assistant("a2"), user("q3")]
    before = [*(system if repeats else []), *(first if repeats else []), *middle]
    fields = {"prompt": first, "chosen": [*before, assistant("good")], "rejected": [*before, assistant("bad")]}
    example = RowReader().read(Row("x:1", fields))
    assert example.prompt == [*(system if repeats else []), *first, *middle]
    assert example.completions == ([assistant("good")], [assistant("bad")])


def test_dialogues_that_differ_earlier_or_follow_another_prompt_say_so():
    fields = {"prompt": "q", "chosen": [assistant("a"), user("x"), assistant("b")], "rejected": [assistant("c")]}
    example = RowReader().read(Row("x:1", fields))  # only the assistant's turns of them count
    assert example.completions == (fields["chosen"], fields["rejected"])
    other = {"prompt": "q", "chosen": [user("x"), assistant("a")], "rejected": [user("x"), assistant("b")]}
    with pytest.raises(DataError, match="'chosen' has 2 turns after the common prompt, and does not begin with it"):
        RowReader().read(Row("x:1", other))


# A4


LEAVES_OUT = {
    "reasoning": (CUTTING, r"leaves out 'Because 1'|leaves out .*Because"),
    "system turns": (
        each("{% if m['role'] != 'system' %}" + TURN + "{% endif %}"),
        r"leaves out 'Be very kind\.?' of turn 1",
    ),
    "all but the beginning": (each("{{ '<s>' + m['content'][:12] + '</s>' }}"), "leaves out"),
    "all but the last turn": ("{{ '<s>' + messages[-1]['content'] + '</s>' }}", "leaves out"),
    "capitals": (each("{{ '<s>' + m['content'] | lower + '</s>' }}"), "writes .* where the row has"),
    "signs": (each("{{ '<s>' + m['content'] | replace('?', '') + '</s>' }}"), r"changes turn 2 \(user\)"),
    "nothing, but twice": (each(TURN + TURN), "writes turns twice"),
    "nothing, but backwards": ("{% for m in messages | reverse %}" + TURN + "{% endfor %}", "in another order"),
    "escapes": (each("{{ '<s>' + m['content'] | tojson + '</s>' }}"), r"changes turn|writes"),
}


@pytest.mark.parametrize("name", LEAVES_OUT)
def test_a_template_that_changes_a_turn_makes_bad_rows_in_check_and_in_training(tokenizer_of, write, name):
    template, message = LEAVES_OUT[name]
    prompt = [{"role": "system", "content": "Be very kind."}, user('Why did he say "No"?')]
    answers = {side: [assistant(f"<think>Because {side}</think>It is {side}.")] for side in ("chosen", "rejected")}
    source = DataSource(write({"prompt": prompt, **answers}))
    tokenizer = tokenizer_of(template)
    report = check(source, tokenizer=tokenizer, stop_token_ids={1})
    assert report.source.bad == 1
    with pytest.raises(DataError, match=message) as caught:
        load(tokenizer, source)
    assert report.source.messages[0] in str(caught.value)
    assert "set model.chat_template" in str(caught.value)
    prompts = DataSource(source.path)
    if name not in ("reasoning", "all but the last turn"):  # they keep a prompt alone as it is, or most of it
        with pytest.raises(DataError, match=r"set model\.chat_template"):
            load_prompts([PromptSource(prompts.path)], tokenizer, max_length=999)


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill", "qwen3", "llama3", "gemma3", "gptoss"])
def test_bundled_templates_write_reasoning_or_the_row_is_bad(tokenizer_of, name):
    tokenizer = tokenizer_of((BUNDLED / f"{name}.jinja").read_text())
    source = [user("Why?")], ([assistant("<think>I see it</think>Yes.")], [assistant("<think>Not so</think>No.")])
    example = RowReader().read(Row("x:1", {"prompt": source[0], "chosen": source[1][0], "rejected": source[1][1]}))
    if name.startswith("deepseek"):
        with pytest.raises(DataError, match=r"leaves out 'I see it</think>' of turn 2 \(assistant\)"):
            encode(example, tokenizer, stop_token_ids={1})
        return
    tree = encode(example, tokenizer, stop_token_ids={1}).tree
    assert "I see it" in tokenizer.decode(tree.completion_ids[0])


def test_short_and_common_contents_are_seen_to_be_left_out(tokenizer_of):
    dropping = each("{{ '<s>' + m['role'] + ' a b the user assistant ?' + '</s>' }}")
    for content in ("a", "the", "user", "?", "assistant"):
        example = RowReader().read(Row("x:1", {"prompt": [user(content)], "chosen": "xx", "rejected": "yy"}))
        with pytest.raises(DataError, match="leaves out"):
            encode(example, tokenizer_of(dropping), stop_token_ids={1})
        encode(example, tokenizer_of(), stop_token_ids={1})


def test_a_prompt_that_an_answer_changes_is_a_bad_row(tokenizer_of):
    template = "{% if not add_generation_prompt %}{{ 'ANSWERED ' }}{% endif %}" + each(TURN)
    example = RowReader().read(Row("x:1", {"prompt": [user("q")], "chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match="changes the prompt when an answer follows"):
        encode(example, tokenizer_of(template), stop_token_ids={1})


def test_a_tokenizer_without_a_character_makes_a_bad_row(tokenizer_of, write, merging):
    with pytest.raises(DataError, match=r"x:1: the tokenizer has no tokens for 'é?.*model whose tokenizer has them"):
        encode(
            RowReader().read(Row("x:1", {"prompt": "abc", "chosen": "x¿y", "rejected": "z"})),
            merging(),
            stop_token_ids=[],
        )
    exotic = {"prompt": "Ünïcödé ﬁ ①\u200b", "chosen": "日本語 \U0001f600", "rejected": "b"}
    encode(RowReader(chat=True).read(Row("x:1", exotic)), tokenizer_of(), stop_token_ids={1})


def test_each_count_has_one_cause(tokenizer_of, write):
    opening = each(TURN) + "{% if add_generation_prompt %}{{ '<s>assistant: <think>' }}{% endif %}"
    rows = [{"prompt": [user(f"q{i}")], "chosen": "a", "rejected": "b"} for i in range(4)]
    report = check(DataSource(write(*rows)), tokenizer=tokenizer_of(opening), stop_token_ids={1}, window=WIDE).source
    assert (report.reopened, report.drifting) == (4, 0)
    assert "opens the answer differently from its generation prompt" in " ".join(report.remarks())
    trimming = each("{{ '<s>' + m['content'] | trim + '</s>' }}")
    spaced = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant(" a ")]}
    found = check(DataSource(write(spaced)), tokenizer=tokenizer_of(trimming), stop_token_ids={1}, window=WIDE).source
    assert (found.bad, dict(found.dropped)) == (1, {})
    assert "are the same tokens, because they differ only in white space" in found.messages[0]


# A6


@pytest.mark.parametrize(
    ("key", "value"), [("name", "Ann"), ("weight", 0), ("reasoning_content", "r"), ("date", {"a": 1})]
)
def test_a_key_of_a_turn_is_given_to_the_template_or_refused_by_name(tokenizer_of, key, value):
    fields = {"prompt": [user("q", **{key: value})], "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=rf"x:1: a turn has the key '{key}' .* does not read; .*ignore=\[{key}\]"):
        encode(RowReader().read(Row("x:1", fields)), tokenizer_of(), stop_token_ids={1})
    reads = each("{{ '<s>' + m['content'] + (m['" + key + "'] | string if '" + key + "' in m else '') + '</s>' }}")
    tokenizer = tokenizer_of(reads)
    tree = encode(RowReader().read(Row("x:1", fields)), tokenizer, stop_token_ids={1}).tree
    assert str(value) in tokenizer.decode(tree.prompt_ids)
    encode(RowReader(ignore=[key]).read(Row("x:1", fields)), tokenizer_of(), stop_token_ids={1})
    empty = {**fields, "prompt": [user("q", **{key: None})]}
    encode(RowReader().read(Row("x:1", empty)), tokenizer_of(), stop_token_ids={1})


# A7


@pytest.mark.parametrize("empty", ["[]", [], None, "", "null", {}, float("nan")])
def test_empty_columns_are_empty_and_text_parts_are_joined(empty):
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?", "image": None}]
    fields = {
        "prompt": [user(parts, tool_calls=empty)],
        "chosen": "a",
        "rejected": "b",
        "tools": empty,
        "images": empty,
    }
    assert RowReader().read(Row("x:1", fields)).prompt == [user("What is it?")]
    with pytest.raises(DataError, match="images are not supported"):
        RowReader().read(Row("x:1", {**fields, "prompt": [user([{"type": "image", "url": "x"}])]}))


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_a_table_with_another_separator_is_named(tmp_path, separator, name):
    path = tmp_path / "rows.csv"
    path.write_text(separator.join(("prompt", "chosen", "rejected")) + "\n" + separator.join("qab") + "\n")
    with pytest.raises(DataError, match=rf"rows.csv:1: the columns are separated by {name}, .* save .* with commas"):
        list(read_examples(DataSource(str(path))))


# A5


def test_an_imitating_objective_learns_from_what_is_preferred_alone(tokenizer_of, write):
    tokenizer = tokenizer_of()
    pairs = [{"prompt": [user(f"q{i}")], "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    labels = [{"prompt": [user(f"l{i}")], "completion": f"text {i}", "label": i != 1} for i in range(3)]
    lists = [{"prompt": [user("r")], "completions": ["worst", "best", "also"], "scores": [0, 2, 2]}]
    sources = (DataSource(write(*rows, name=f"{i}.jsonl")) for i, rows in enumerate((pairs, labels, lists)))
    found = demonstrations(load(tokenizer, *sources))
    left = [tokenizer.decode(ids) for tree in found.data.train for ids in tree.completion_ids]
    assert left == [f"{text}</s>" for text in ("good 0", "good 1", "good 2", "text 0", "text 2", "best", "also")]
    assert (found.rejected, found.undesirable, found.data.report.num_train) == (4, 1, 6)
    with pytest.raises(DataError, match="labeled false"):
        demonstrations(load(tokenizer, DataSource(write(labels[1]))))


# A9


def test_held_out_prompts_that_are_trained_on_are_counted(tokenizer_of, write):
    rows = [{"question": f"Question {i}", "answer": i} for i in range(6)]
    train = PromptSource(write(*rows[:5], name="train.jsonl"), template="{question}", chat=True)
    path = write(*rows[3:], name="eval.jsonl")
    for source in (
        PromptSource(path, template="{question}", chat=True),
        PromptSource(path, template="{question}", chat=False),
        PromptSource(path, template="{question}", chat=True, system="Be kind."),
        PromptSource(path, template="{question} Answer:", chat=True),
    ):
        data = load_prompts([train], tokenizer_of(), max_length=99, eval_sources=[source])
        assert (data.report.num_eval, data.report.shared_prompts) == (3, 2)


# C21


def test_a_mixture_draws_the_same_rows_however_its_paths_are_written(tokenizer_of, write, tmp_path, monkeypatch):
    rows = [{"prompt": [user(f"q{i}")], "chosen": "a", "rejected": "b"} for i in range(40)]
    for name in ("a.jsonl", "b.jsonl"):
        write(*rows, name=name)
    monkeypatch.chdir(tmp_path)
    drawn = []
    for folder in ("", "./", f"{tmp_path}/", f"../{tmp_path.name}/", f"{tmp_path}//"):
        sources = [DataSource(f"{folder}a.jsonl", weight=3.0), DataSource(f"{folder}b.jsonl", weight=1.0)]
        drawn.append([tree.place.rpartition("/")[2] for tree in load(tokenizer_of(), *sources, seed=5).train])
    assert all(each == drawn[0] for each in drawn[1:])
    assert len(drawn[0]) == 53


# E3


def test_columns_inside_columns_are_reached_and_renamed(tokenizer_of, write):
    row = {"data": {"question": "2 + 2?"}, "reward_model": {"ground_truth": "4"}, "completions": ["x"]}
    columns = {"prompt": "data.question", "answer": "reward_model.ground_truth", "earlier": "completions"}
    source = PromptSource(write(row), columns=columns, chat=True)
    (found,) = load_prompts([source], tokenizer_of(), max_length=99).train
    assert found.prompt == [user("2 + 2?")]
    assert (found.columns["answer"], found.columns["earlier"]) == ("4", ["x"])
    assert "completions" not in found.columns
    pairs = {"a": {"b": "q"}, "chosen": "x", "rejected": "y"}
    assert RowReader(columns={"prompt": "a.b"}).read(Row("x:1", pairs)).prompt == "q"
    with pytest.raises(DataError, match=r"columns=\{prompt: a.c\} names a column that is missing"):
        RowReader(columns={"prompt": "a.c"}).read(Row("x:1", pairs))


def test_a_system_column_of_prompts_is_their_system_turn(tokenizer_of, write):
    path = write({"prompt": "q", "system": "Be kind."})
    (row,) = load_prompts([PromptSource(path)], tokenizer_of(), max_length=99).train
    assert row.prompt == [{"role": "system", "content": "Be kind."}, user("q")]
    path = write({"prompt": "q", "system_prompt": "Be kind."})
    with pytest.raises(DataError, match=r"set columns=\{system: system_prompt\}"):
        load_prompts([PromptSource(path, chat=True)], tokenizer_of(), max_length=99)


# F4, first hour 1


def test_plain_text_on_a_chat_model_asks(tokenizer_of, write):
    pairs = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path, tokenizer = write(pairs), tokenizer_of()
    message = r"\.jsonl:1: the row is plain text, and the model has a chat template, so say how"
    for refused in (
        lambda: load(tokenizer, DataSource(path), bad_rows="skip"),
        lambda: check(path, tokenizer=tokenizer, stop_token_ids={1}),
        lambda: load_prompts([PromptSource(write({"prompt": "q"}, name="p.jsonl"))], tokenizer, max_length=99),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()
    assert check(path).ok
    plain, chat = (load(tokenizer, DataSource(path, chat=said)).train[0] for said in (False, True))
    assert texts(tokenizer, plain)[0] == "q"
    assert texts(tokenizer, chat)[0] == "<s>userq</s><s>assistant"
    bare = tokenizer_of(None)
    assert len(load(bare, DataSource(path)).train) == 1
