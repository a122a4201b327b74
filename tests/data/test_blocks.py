"""Rows that are tokenized in several processes, or come from a cache, are the same to the id."""

from datetime import datetime

import pytest

from falign.data import DataSource, Processing, Window, load_preferences
from falign.data.blocks import Blocks, tokenizer_identity
from falign.errors import ConfigError, DataError
from falign.models.tokenizers import fix_date, fix_options
from falign.runfile import parse_run
from falign.training.offline import read_data
from falign.training.parts import load_language
from tests.models.tiny import save_tiny, tiny_tokenizer
from tests.training.pairs import run_data, write_pairs

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"question {i} " + "long " * (i % 7)}],
        "chosen": [{"role": "assistant", "content": f"yes {i}"}, {"role": "user", "content": "?"}] * (i % 3 == 0)
        + [{"role": "assistant", "content": f"indeed {i}"}],
        "rejected": f"no {i}" if i % 11 else "",
        "weight": 1 + i % 2,
    }
    for i in range(60)
]


def load(path, processing=None, *, tokenizer=None, limit=None, bad_rows="skip", **window):
    return load_preferences(
        [DataSource(str(path), limit=limit)],
        tokenizer or tiny_tokenizer(),
        stop_token_ids=(),
        window=Window(**{"max_length": 90, "long_prompt": "drop", **window}),
        bad_rows=bad_rows,
        processing=processing or Processing(),
    )


@pytest.fixture
def hits(monkeypatch):
    """The cache's hits and misses of blocks, in order."""
    seen, tokenized = [], Blocks.tokenized

    def whole(self, examples):
        before = self.hits
        found = tokenized(self, examples)
        seen.append("hit" if self.hits > before else "miss")
        return found

    monkeypatch.setattr(Blocks, "tokenized", whole)
    return seen


@pytest.mark.parametrize("limit", [None, 7, 40])
def test_processes_and_the_cache_give_the_rows_counts_and_messages_of_one_process(
    write_rows, tmp_path, limit, monkeypatch
):
    monkeypatch.setattr("falign.data.reading.BLOCK", 16)
    path = write_rows(*ROWS)
    plain = load(path, limit=limit)
    assert plain.report.sources[0].bad
    assert limit == 7 or plain.report.sources[0].dropped
    for processing in (
        Processing(num_proc=2),
        Processing(cache=str(tmp_path / "cache")),
        Processing(num_proc=2, cache=str(tmp_path / "cache")),
    ):
        assert load(path, processing, limit=limit) == plain


def test_a_bad_row_stops_at_the_same_place(write_rows, monkeypatch):
    monkeypatch.setattr("falign.data.reading.BLOCK", 16)
    # One is bad when it is read, the other when it is tokenized; the first of them stops the run.
    stop = {**ROWS[1], "chosen": [{"role": "assistant", "content": "a</s>b"}]}
    empty = {**ROWS[1], "rejected": ""}
    for rows, line in (([*ROWS[1:9], stop, empty], 9), ([*ROWS[1:9], empty, stop], 9)):
        path = write_rows(*rows)
        with pytest.raises(DataError) as plain:
            load(path, bad_rows="error")
        with pytest.raises(DataError) as parallel:
            load(path, Processing(num_proc=2), bad_rows="error")
        assert str(parallel.value) == str(plain.value)
        assert f":{line}:" in str(plain.value)


def test_what_decides_the_tokens_misses_and_nothing_else(write_rows, tmp_path, hits):
    cache = Processing(cache=str(tmp_path / "cache"))
    rows = ROWS[1:11]
    path = write_rows(*rows)

    def outcome(path=path, **changes):
        hits.clear()
        load(path, cache, **changes)
        return hits

    assert outcome() == ["miss"]
    assert outcome() == ["hit"]
    assert outcome(write_rows(*rows, name="elsewhere.jsonl")) == ["hit"]  # the same rows in another file
    assert outcome(write_rows(*({**row, "weight": 3} for row in rows))) == ["hit"]  # no tokens depend on it
    assert outcome(write_rows(*rows[:-1], {**rows[-1], "rejected": "never"})) == ["miss"]
    assert outcome(write_rows(*reversed(rows))) == ["miss"]
    assert outcome(max_length=80) == ["miss"]
    assert outcome(long_completion="drop") == ["miss"]
    changed = tiny_tokenizer()
    changed.chat_template = changed.chat_template.replace("m['content']", "m['content'] + ' '")
    assert outcome(tokenizer=changed) == ["miss"]
    more = tiny_tokenizer()
    more.add_tokens(["yes"])
    assert outcome(tokenizer=more) == ["miss"]


def test_the_date_that_a_template_writes_and_its_options_are_part_of_the_identity():
    def identity(day, options=None, template="{{ strftime_now('%d %b') }}{% if quiet %}{% endif %}"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        fix_date(tokenizer, day)
        if options:
            fix_options(tokenizer, options)
        return tokenizer_identity(tokenizer)

    morning, evening, next_day = datetime(2026, 5, 1, 8), datetime(2026, 5, 1, 20), datetime(2026, 5, 2, 8)
    assert identity(morning) == identity(evening)
    assert identity(morning) != identity(next_day)
    assert identity(morning) != identity(morning, {"quiet": True})
    assert identity(morning, template="plain") == identity(next_day, template="plain")


def test_a_run_hits_under_another_learning_rate_and_has_the_same_data(tmp_path, hits):
    model, pairs = save_tiny(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl")
    cache = {"data": {"cache": str(tmp_path / "cache"), "num_proc": 2}}

    def read(**changes):
        config = parse_run(run_data(model, pairs, tmp_path / "run", **changes))
        return read_data(config, load_language(config), config.check(), tell=lambda notice: None)

    plain = read()
    assert hits == []
    assert read(**cache) == plain
    assert read(**cache, training={"learning_rate": 0.5}) == plain
    assert hits == ["miss", "hit"]


def test_a_damaged_file_of_the_cache_is_named(write_rows, tmp_path):
    cache = Processing(cache=str(tmp_path / "cache"))
    path = write_rows(*ROWS[1:5])
    load(path, cache)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"json\.z: this file of the cache is damaged .*; remove it"):
        load(path, cache)


def test_a_cache_that_is_a_file_and_no_processes_are_refused(write_rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache=.*file cannot be written .*: give another folder"):
        load(write_rows(*ROWS[1:3]), Processing(cache=str(tmp_path / "file")))
    with pytest.raises(ConfigError, match="num_proc=0 must be at least 1"):
        Processing(num_proc=0)


def test_options_of_the_template_reach_data_and_unknown_ones_are_refused(tmp_path):
    model, pairs = save_tiny(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl")
    template = "{% if quiet %}sh {% endif %}{% for m in messages %}{{ m['role'] + m['content'] + '</s>' }}{% endfor %}"

    def read(options):
        section = {"path": str(model), "chat_template": template, "chat_template_kwargs": options}
        data = {"train": [{"path": str(pairs), "chat": True}]}
        run = run_data(model, pairs, tmp_path / "run", model=section, data=data)
        config = parse_run(run)
        language = load_language(config)
        tree = read_data(config, language, config.check(), tell=lambda notice: None).train[0]
        return language.tokenizer.decode(tree.prompt_ids)

    assert read({"quiet": True}) == f"sh {read({})}"
    with pytest.raises(ConfigError, match=r"model\.chat_template_kwargs\.loud: the chat template does not read it"):
        read({"loud": True})
    with pytest.raises(ConfigError, match=r"model\.chat_template_kwargs\.tokenize is set by falign itself"):
        read({"tokenize": True})
