import pytest

from falign.data import Example, Row, RowReader
from falign.data.recognition import recognize
from falign.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def read(fields, format="auto", columns=None):
    return RowReader(format, columns).read(Row("pairs.jsonl:3", fields))


CONVERSATION = ([user("q")], ([assistant("a")], [assistant("b")]))
LAYOUTS = {
    "preference, plain": ("preference", {"prompt": "q ", "chosen": "a", "rejected": "b"}, ("q ", ("a", "b"))),
    "preference, conversation": (
        "preference",
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        CONVERSATION,
    ),
    "preference, the prompt repeated in the completions": (
        "preference",
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        CONVERSATION,
    ),
    "preference, conversation and plain answers": (
        "preference",
        {"prompt": [user("q")], "chosen": "a", "rejected": assistant("b")},
        CONVERSATION,
    ),
    "preference, system column": (
        "preference",
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
        ([system("s"), user("q")], CONVERSATION[1]),
    ),
    "preference, empty system column": (
        "preference",
        {"system": None, "prompt": "q", "chosen": "a", "rejected": "b"},
        CONVERSATION,
    ),
    "implicit, conversation": (
        "implicit",
        {"chosen": [system("s"), user("q"), assistant("a")], "rejected": [system("s"), user("q"), assistant("b")]},
        ([system("s"), user("q")], CONVERSATION[1]),
    ),
    "implicit, plain: cut back to before white space": (
        "implicit",
        {"chosen": "Q: why? A: because", "rejected": "Q: why? A: bees"},
        ("Q: why? A:", (" because", " bees")),
    ),
    "implicit, plain: one text continues the other": (
        "implicit",
        {"chosen": "one two", "rejected": "one two three"},
        ("one", (" two", " two three")),
    ),
    "hh": (
        "hh",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: b",
        },
        ([user("q"), assistant("x"), user("r")], CONVERSATION[1]),
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "q", "input": "", "output": "o", "chosen": "a", "rejected": "b"},
        CONVERSATION,
    ),
    "alpaca with input, history and system": (
        "alpaca",
        {"instruction": "q", "input": "i", "history": [["x", "y"]], "system": "s", "chosen": "a", "rejected": "b"},
        ([system("s"), user("x"), assistant("y"), user("q\ni")], CONVERSATION[1]),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": [{"from": "gpt", "value": "b"}],
        },
        ([system("s"), user("q")], CONVERSATION[1]),
    ),
}


@pytest.mark.parametrize(("format", "fields", "want"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout_is_recognised_and_brought_to_the_normal_form(format, fields, want):
    assert recognize(Row("", fields)) == format
    assert read(fields) == Example(*want, (1.0, 0.0), "pairs.jsonl:3")


@pytest.mark.parametrize(
    ("format", "fields", "completions", "preference"),
    [
        ("ranked", {"completions": ["a", "b", "c"], "scores": [0.5, 2, -1]}, ("a", "b", "c"), (0.5, 2.0, -1.0)),
        ("ranked", {"completions": ["a", "b", "c"], "ranks": [2, 1, 2]}, ("a", "b", "c"), (-2.0, -1.0, -2.0)),
        ("unpaired", {"completion": "a", "label": True}, ("a",), (1.0,)),
        ("unpaired", {"completion": "a", "label": " False"}, ("a",), (0.0,)),
        ("completion", {"completion": "a"}, ("a",), None),
    ],
)
def test_lists_and_single_completions_have_the_same_normal_form(format, fields, completions, preference):
    fields = {"prompt": "q", **fields}
    assert recognize(Row("", fields)) == format
    assert read(fields) == Example("q", completions, preference, "pairs.jsonl:3")


def test_ranked_conversations_and_messages():
    ranked = read({"prompt": "q", "completions": [[assistant("a")], [assistant("b")]], "scores": [1, 2]})
    assert (ranked.prompt, ranked.completions) == CONVERSATION
    unpaired = read({"messages": [user("q"), assistant("a")], "label": False})
    assert (unpaired.prompt, unpaired.completions, unpaired.preference) == ([user("q")], ([assistant("a")],), (0.0,))


def test_columns_are_renamed_and_may_be_exchanged():
    fields = {"question": "q", "chosen": "b", "rejected": "a"}
    columns = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    assert read(fields, columns=columns) == Example("q", ("a", "b"), (1.0, 0.0), "pairs.jsonl:3")
    # The column under its old name is gone, so it does not decide the layout either.
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"}, columns={"instruction": "prompt"}).prompt == [
        user("q")
    ]
    assert read({"q": "q", "chosen": "a", "rejected": "b"}, "alpaca", {"instruction": "q"}).prompt == [user("q")]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
TURNS = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "chosn": "a", "rejected": "b"}, r"column 'chosen' is missing; .*columns=\{chosen: chosn\}"),
        ({"prompt": "q", "chosen": "a"}, r"column 'rejected' is missing; the row has \['chosen', 'prompt'\]"),
        ({"a": 1}, "column 'chosen' is missing"),
        ({"prompt": "q"}, r"the columns \['prompt'\] are not a layout that falign knows"),
        (
            {"question": "q", "chosen": "The a", "rejected": "The b"},
            r"'question' looks like one; set columns=\{prompt: question\}",
        ),
        (
            {"promt": "q", "chosen": "The a", "rejected": "The b"},
            r"'promt' looks like one; set columns=\{prompt: promt\}",
        ),
        ({**PAIR, "prompt": None}, "'prompt' is None; it must be text or a list of turns"),
        ({**PAIR, "prompt": " \n"}, r"the prompt is empty \(' \\n'\); it must contain text"),
        ({**PAIR, "prompt": []}, r"the prompt is empty \(\[\]\)"),
        ({**PAIR, "chosen": "\t "}, r"'chosen' is empty \('\\t '\)"),
        ({**PAIR, "rejected": ""}, r"'rejected' is empty \(''\)"),
        ({**PAIR, "chosen": "a\ud83d"}, r"'chosen' has half a surrogate pair \('a\\ud83d'\)"),
        ({**PAIR, "rejected": "a"}, r"'chosen' and 'rejected' are equal \('a'\)"),
        ({**TURNS, "rejected": [assistant("a")]}, r"'chosen' and 'rejected' are equal \('a'\)"),
        ({**TURNS, "chosen": [assistant("  ")]}, "'chosen' is empty"),
        ({**TURNS, "chosen": []}, "'chosen' is empty"),
        ({**TURNS, "chosen": [{"role": "bot", "content": "a"}]}, r"'chosen\[0\]' has the unknown role 'bot'"),
        (
            {**TURNS, "chosen": [assistant("a"), user("b")]},
            "last turn of 'chosen' is by 'user'; it must be the assistant's",
        ),
        (
            {**TURNS, "chosen": [user("x"), assistant("a")]},
            "'chosen' goes on with a turn by 'user' after",
        ),
        ({**TURNS, "prompt": [user("q"), assistant("x")]}, "the last turn of the prompt is the assistant's, 'x'"),
        ({**TURNS, "prompt": [system("t"), user("q")], "system": "s"}, "another system turn in its prompt; keep one"),
        (
            {**TURNS, "images": [{"name": "f"}]},
            "column 'images' is not supported, and leaving it out would change the prompt",
        ),
        ({"chosen": "alpha", "rejected": "beta"}, "have no words in common at their beginning, so there is no prompt"),
        ({"chosen": "a b", "rejected": [assistant("b")]}, "one of 'chosen' and 'rejected' is text, the other"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1]}, r"'scores' is \[1\]; it must be 2 numbers"),
        ({"prompt": "q", "completions": ["a", "b"], "ranks": ["1", "2"]}, "'ranks' is .*; it must be 2 numbers"),
        ({"prompt": "q", "completions": "ab", "scores": [1, 2]}, "'completions' is 'ab'; it must be a list"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [2, 2]}, "all 2 completions have the same score"),
        (
            {"prompt": "q", "completions": ["a", "a"], "scores": [1, 2]},
            r"'completions\[0\]' and 'completions\[1\]' are equal",
        ),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1, float("nan")]}, "it must be finite numbers"),
        ({"prompt": "q", "completions": [], "scores": []}, "there are no completions"),
        (
            {"prompt": "q", "completion": "a", "label": "good"},
            r"'label' is 'good'; it must be true \(desirable\) or false",
        ),
        ({"instruction": "q", "input": 3, "chosen": "a", "rejected": "b"}, "'input' is 3; it must be text"),
        (
            {"instruction": "q", "history": ["x"], "chosen": "a", "rejected": "b"},
            "'history' has 'x'; it must be a list of",
        ),
    ],
)
def test_bad_row_is_named_with_place_and_reason(fields, message):
    with pytest.raises(DataError, match=message) as caught:
        read(fields)
    assert str(caught.value).startswith("pairs.jsonl:3: ")


def test_common_prefix_is_never_guessed_inside_hh_dialogues():
    fields = {"chosen": "\n\nHuman: q\n\nAssistant: ab", "rejected": "\n\nHuman: q\n\nAssistant: ac"}
    with pytest.raises(DataError, match="'chosen' is a dialogue in HH-RLHF's layout, not one text; set format=hh"):
        read(fields, "implicit")


HH = "\n\nHuman: Name a color.\n\nAssistant: Warm?\n\nHuman: No.\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "Name a color."},
    {"role": "assistant", "content": "Warm?"},
    {"role": "user", "content": "No."},
]


def test_dialogues_with_the_line_ends_of_windows_are_dialogues():
    row = {side: (HH + text).replace("\n", "\r\n") for side, text in (("chosen", " Blue."), ("rejected", " Table."))}
    reader = RowReader()
    example = reader.read(Row("x:1", row))
    assert reader.format == "hh"
    assert example.prompt == TURNS
    assert [turns[0]["content"] for turns in example.completions] == ["Blue.", "Table."]


@pytest.mark.parametrize("prompt", [HH, HH.lstrip() + " ", HH.replace("\n", "\r\n"), HH.removesuffix("\n\nAssistant:")])
def test_a_prompt_in_hh_becomes_its_turns_where_plain_texts_are_turns(prompt):
    row = Row("x:1", {"prompt": prompt, "chosen": " Blue.", "rejected": " Table."})
    example = RowReader(chat=True).read(row)
    assert example.prompt == TURNS
    assert [turns[0]["content"] for turns in example.completions] == ["Blue.", "Table."]
    assert RowReader(chat=False).read(row).prompt == prompt  # continued as it stands


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prompt", ["Name a color.", HH])
def test_whole_dialogues_beside_a_prompt_are_refused(prompt, chat):
    row = {"prompt": prompt, "chosen": HH + " Blue.", "rejected": HH + " Table."}
    with pytest.raises(DataError, match=r"x:1: 'chosen' is a whole dialogue .*format=hh"):
        RowReader(chat=chat).read(Row("x:1", row))
    assert RowReader("hh", ignore=["prompt"]).read(Row("x:1", row)).prompt == TURNS


@pytest.mark.parametrize("chat", [True, False])
def test_plain_completions_that_repeat_the_prompt_are_refused(chat):
    question = "Q: 1 + 1?\nA:"
    pair = {"prompt": question, "chosen": f"{question} 2", "rejected": f"{question} 3"}
    single = {"prompt": question, "completion": f"{question} 2"}
    for row in (pair, single):
        with pytest.raises(DataError, match=r"x:1: .* begin.? with the whole prompt \('Q: 1 \+ 1\?.*remove it"):
            RowReader(chat=chat).read(Row("x:1", row))
    RowReader(chat=chat).read(Row("x:1", {**pair, "rejected": " 3"}))  # one that quotes the question
    RowReader(chat=chat).read(Row("x:1", {"prompt": "Say", "chosen": "Say please.", "rejected": "Say it."}))


def test_ranks_and_scores_that_contradict_each_other_are_refused():
    row = {"prompt": "q ", "completions": ["a", "b", "c"], "ranks": [1, 2, 3], "scores": [0.9, 0.5, 0.5]}
    assert RowReader().read(Row("x:1", row)).preference == (-1, -2, -3)
    with pytest.raises(DataError, match=r"x:1: 'ranks' \(\[1, 2, 3\]\) and 'scores' .* disagree .*ignore=\[scores\]"):
        RowReader().read(Row("x:1", {**row, "scores": [0.1, 0.5, 0.9]}))
    assert RowReader(ignore=["scores"]).read(Row("x:1", {**row, "scores": [0.1, 0.5, 0.9]})).preference == (-1, -2, -3)
