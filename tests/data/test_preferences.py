import math

import pytest

from falign.data import DataSource, Window, check, load_preferences
from falign.errors import ConfigError, DataError

WIDE = Window(max_length=1000)
CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(byte_bpe):
    return byte_bpe(chat_template=CHATML)


@pytest.fixture
def pairs(write_rows):
    def write(name, count, prompt="{name} question {i}?\n"):
        rows = (
            {"prompt": prompt.format(name=name, i=i), "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)
        )
        return write_rows(*rows, name=f"{name}.jsonl")

    return write


def load(tokenizer, *sources, window=WIDE, **options):
    return load_preferences(list(sources), tokenizer, stop_token_ids=[], window=window, **options)


def test_rows_become_trees_in_their_order(tokenizer, pairs):
    path = pairs("a", 3)
    data = load(tokenizer, DataSource(path, chat=False))
    assert [tree.place for tree in data.train] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert tokenizer.decode(data.train[2].prompt_ids) == "a question 2?\n"
    assert [tokenizer.decode(ids) for ids in data.train[2].completion_ids] == ["yes 2</s>", "no 2</s>"]
    assert data.train[2].preference == (1.0, 0.0)
    assert data.eval == []
    assert (data.report.num_train, data.report.num_eval, data.report.shared_prompts) == (3, 0, 0)
    assert (data.report.sources[0].path, data.report.sources[0].format) == (path, "preference")


def test_sources_without_weights_are_joined_and_limited(tokenizer, pairs):
    data = load(tokenizer, DataSource(pairs("a", 5), chat=False, limit=2), DataSource(pairs("b", 3), chat=False))
    names = [tokenizer.decode(tree.prompt_ids) for tree in data.train]
    assert names == [f"{name} question {i}?\n" for name, i in (("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2))]
    assert [report.read for report in data.report.sources] == [2, 3]


def test_limit_counts_usable_rows(tokenizer, write_rows, pairs):
    good = {"prompt": "q\n", "chosen": "a", "rejected": "b"}
    path = write_rows({**good, "chosen": ""}, good, good, good)
    data = load(tokenizer, DataSource(path, chat=False, limit=2), bad_rows="skip")
    assert (data.report.num_train, data.report.sources[0].bad, data.report.sources[0].read) == (2, 1, 3)


def test_weights_are_shares_of_what_is_drawn_and_the_seed_decides(tokenizer, pairs):
    sources = DataSource(pairs("a", 40), chat=False, weight=3.0), DataSource(pairs("b", 40), chat=False, weight=1.0)
    first, again, other = (load(tokenizer, *sources, seed=seed) for seed in (1, 1, 2))
    from_a = sum(tokenizer.decode(tree.prompt_ids).startswith("a") for tree in first.train)
    assert (from_a, len(first.train) - from_a) == (40, 13)
    assert first.train == again.train
    assert first.train != other.train


def test_evaluation_split_never_shares_a_prompt(tokenizer, pairs):
    # 60 rows of 30 prompts: the second source asks the first one's questions in other case and spacing.
    sources = (
        DataSource(pairs("a", 30), chat=False),
        DataSource(pairs("b", 30, prompt="A  question {i}?\n"), chat=False),
    )
    data = load(tokenizer, *sources, eval_size=11, seed=5)
    sides = [
        {tokenizer.decode(tree.prompt_ids).lower().split()[-1] for tree in side} for side in (data.train, data.eval)
    ]
    assert (len(data.train), len(data.eval)) == (50, 10)
    assert not sides[0] & sides[1]
    assert (data.report.num_train, data.report.num_eval, data.report.shared_prompts) == (50, 10, 0)


def test_evaluation_source_of_its_own_and_what_it_shares_with_training(tokenizer, pairs):
    data = load(
        tokenizer,
        DataSource(pairs("a", 5), chat=False),
        eval_sources=[DataSource(pairs("a", 2), chat=False), DataSource(pairs("c", 4), chat=False)],
    )
    assert (len(data.train), len(data.eval), data.report.shared_prompts) == (5, 6, 2)
    assert [report.kept for report in data.report.eval_sources] == [2, 4]


def test_a_row_without_a_preference_is_bad_where_one_is_needed(tokenizer, write_rows):
    good = {"prompt": "q\n", "completions": ["a", "b"], "scores": [1, 0]}
    path = write_rows(good, {**good, "completions": ["a"], "scores": [1]}, good)
    source, message = DataSource(path, chat=False), "rows.jsonl:2: no completion is preferred to another"
    assert load(tokenizer, source).report.sources[0].bad == 0
    with pytest.raises(DataError, match=message):
        load(tokenizer, source, preferences=True)
    report = load(tokenizer, source, preferences=True, bad_rows="skip").report.sources[0]
    checked = check(source, tokenizer=tokenizer, preferences=True).source
    for found in (report, checked, check(source, preferences=True).source):
        assert (found.read, found.bad, found.kept) == (3, 1, 2)
        assert message in found.messages[0]


def test_bad_row_stops_or_is_counted(tokenizer, write_rows):
    good = {"prompt": "q\n", "chosen": "a", "rejected": "b"}
    path = write_rows(good, "not json", {**good, "rejected": "a"}, good, {**good, "chosen": "a</s>b"})
    with pytest.raises(DataError, match=r"rows.jsonl:2: this line is not JSON .* \(bad_rows=skip leaves such rows out"):
        load(tokenizer, DataSource(path, chat=False))
    report = load(tokenizer, DataSource(path, chat=False), bad_rows="skip").report.sources[0]
    assert (report.read, report.bad, report.kept, report.duplicates) == (5, 3, 2, 1)
    assert [message.removeprefix(path)[:3].strip(":") for message in report.messages] == ["2", "3", "5"]


def test_long_prompt_stops_by_default_and_is_a_bad_row_when_skipping(tokenizer, write_rows):
    good = {"prompt": "q\n", "chosen": "a", "rejected": "b"}
    path = write_rows(good, {**good, "prompt": "z" * 50})
    window = Window(max_length=20)
    with pytest.raises(DataError, match=r"rows.jsonl:2: the prompt has 50 tokens .*set `long_prompt` to cut"):
        load(tokenizer, DataSource(path, chat=False), window=window)
    of_a_run = r"in data.max_length=20 .* Raise `data.max_length`; a run can also lower `data.max_completion_length`"
    with pytest.raises(DataError, match=of_a_run):
        load(tokenizer, DataSource(path, chat=False), window=window, skip_by="data.bad_rows=skip")
    assert load(tokenizer, DataSource(path, chat=False), window=window, bad_rows="skip").report.sources[0].bad == 1
    cut = load(tokenizer, DataSource(path, chat=False), window=Window(20, long_prompt="cut")).report.sources[0]
    assert (cut.kept, cut.prompts_cut) == (2, 1)
    dropped = load(tokenizer, DataSource(path, chat=False), window=Window(20, long_prompt="drop")).report.sources[0]
    assert (dropped.kept, dropped.dropped) == (1, {"long prompt": 1})


def test_conversations_without_template_stop_even_when_skipping(byte_bpe):
    with pytest.raises(ConfigError, match=r"set model\.chat_template"):
        load(byte_bpe(), DataSource("demo:polite-preference"), bad_rows="skip")


def test_demo_is_ready_to_train_on(tokenizer):
    data = load(tokenizer, DataSource("demo:polite-preference"), eval_fraction=0.1, seed=0)
    assert len(data.train) + len(data.eval) == 400
    assert 25 <= len(data.eval) <= 55
    assert data.report.sources[0].drifting == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_size": 3, "eval_sources": [DataSource("x")]}, "eval_sources excludes eval_fraction and eval_size"),
        ({"eval_size": 3, "eval_fraction": 0.5}, "one of them 0"),
        ({"eval_size": 10}, "leaves nothing for training"),
    ],
)
def test_contradicting_options_are_refused(tokenizer, pairs, options, message):
    with pytest.raises(ConfigError, match=message):
        load(tokenizer, DataSource(pairs("a", 10), chat=False), **options)


def test_weights_for_some_sources_only_are_refused(tokenizer, pairs):
    sources = DataSource(pairs("a", 2), chat=False, weight=1.0), DataSource(pairs("b", 2), chat=False)
    with pytest.raises(ConfigError, match=r"some sources have a weight and \['.*b.jsonl'\] have none"):
        load(tokenizer, *sources)
    with pytest.raises(ConfigError, match="no data source is given"):
        load(tokenizer)


def test_source_without_a_usable_row_is_an_error(tokenizer, write_rows):
    path = write_rows({"prompt": "q", "chosen": "", "rejected": "b"})
    with pytest.raises(DataError, match=r"none of its 1 rows can be used. The first bad row: .*'chosen' is empty"):
        load(tokenizer, DataSource(path, chat=False), bad_rows="skip")


def test_a_column_weighs_rows_and_a_row_without_a_usable_weight_is_bad(write_rows, byte_bpe, tmp_path):
    rows = [{"prompt": f"Say {i}: ", "chosen": "yes", "rejected": "no", "weight": 2.0 + i} for i in range(3)]
    tokenizer = byte_bpe()

    def load(*rows, name="rows.jsonl", **options):
        source = DataSource(write_rows(*rows, name=name), **options)
        return load_preferences([source], tokenizer, stop_token_ids=(), window=Window(64)).train

    assert [tree.weight for tree in load(*rows)] == [2.0, 3.0, 4.0]
    assert [tree.weight for tree in load(*rows, ignore=("weight",))] == [1.0, 1.0, 1.0]
    without = {name: value for name, value in rows[0].items() if name != "weight"}
    for wrong in (0, -1.0, math.nan, math.inf, None, True, "much", "0"):
        with pytest.raises(DataError, match=r"rows.jsonl:2: 'weight' is .*; it must be a positive, finite number"):
            load(rows[0], {**rows[1], "weight": wrong})
    with pytest.raises(DataError, match=r"rows.jsonl:2: the row has no column 'weight', and those before it have one"):
        load(rows[0], without)
    with pytest.raises(DataError, match=r"rows.jsonl:2: the row has a column 'weight', and those before it have none"):
        load(without, rows[0])
    table = tmp_path / "rows.csv"
    table.write_text("prompt,chosen,rejected,weight\nSay: ,yes,no,0.5\n")
    (tree,) = load_preferences([DataSource(str(table))], tokenizer, stop_token_ids=(), window=Window(64)).train
    assert tree.weight == 0.5
