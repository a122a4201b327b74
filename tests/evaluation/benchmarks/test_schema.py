import pytest

from falign.data import BadRowPolicy, BadRows
from falign.errors import DataError
from falign.evaluation import benchmarks
from tests.evaluation.benchmarks.samples import (
    judgebench_row,
    llmbar_row,
    rewardbench2_row,
    rewardbench_row,
    rm_bench_row,
    write,
)

ROWS = {
    "rewardbench": rewardbench_row("hep-go"),
    "rewardbench2": rewardbench2_row("Math", "1"),
    "rm_bench": rm_bench_row("1", domain="math"),
    "judgebench": judgebench_row("mmlu-pro-law", "A>B"),
    "llmbar": llmbar_row(1, subset="Natural"),
}
TEXTS = {
    "rewardbench": "chosen",
    "rewardbench2": "rejected",
    "rm_bench": "chosen",
    "judgebench": "response_B",
    "llmbar": "output_2",
}
PROMPTS = {"judgebench": "question", "llmbar": "input"}


def read(name, path, policy: BadRowPolicy = "error"):
    bad_rows = BadRows(policy, skip_by="bad_rows=skip")
    return list(benchmarks.get(name).read(path, bad_rows=bad_rows)), bad_rows


@pytest.mark.parametrize("name", ROWS)
def test_a_row_lacking_a_column_says_which_it_lacks_and_has(name, tmp_path):
    column = PROMPTS.get(name, "prompt")
    path = write(tmp_path / "rows.jsonl", [{key: value for key, value in ROWS[name].items() if key != column}])
    with pytest.raises(
        DataError, match=rf"rows\.jsonl:1: {name} also needs the columns \['{column}'\]; the row has \["
    ):
        read(name, path, "skip")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("other", ROWS)
def test_the_file_of_another_benchmark_says_which_it_looks_like(name, other, tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[other]])
    if name == other:
        (item,), _ = read(name, path)
        assert item.place == f"{path}:1"
        return
    with pytest.raises(DataError, match=f"It looks like {other}: name that benchmark"):
        read(name, path, "skip")


def test_a_file_of_pairs_looks_like_preferences(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="It looks like preferences"):
        read("rewardbench2", path)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_completion_is_an_error_or_a_counted_skip(name, empty, tmp_path):
    column = TEXTS[name]
    whole = ROWS[name]
    broken = whole | {column: [*whole[column][:-1], empty] if isinstance(whole[column], list) else empty}
    path = write(tmp_path / "rows.jsonl", [whole, broken, whole])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: '{column}.*' is empty .*bad_rows=skip"):
        read(name, path)
    items, bad_rows = read(name, path, "skip")
    assert [item.place for item in items] == [f"{path}:1", f"{path}:3"]
    assert bad_rows.count == 1


@pytest.mark.parametrize("name", ROWS)
def test_a_later_row_without_a_column_is_a_bad_row(name, tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[name], {"id": "1"}])
    items, bad_rows = read(name, path, "skip")
    assert (len(items), bad_rows.count) == (1, 1)
    assert f"{name} also needs the columns" in bad_rows.messages[0]


@pytest.mark.parametrize("name", ROWS)
def test_a_source_without_a_usable_row_is_an_error_even_when_skipping(name, tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[name] | {PROMPTS.get(name, "prompt"): " "}])
    with pytest.raises(DataError, match=r"none of its rows is an item of the benchmark\. The first bad .*is empty"):
        read(name, path, "skip")
    with pytest.raises(DataError, match="none of its rows is an item"):
        read(name, write(tmp_path / "empty.jsonl", []), "skip")


@pytest.mark.parametrize("name", ["rewardbench", "rewardbench2", "rm_bench", "judgebench"])
def test_without_a_path_the_hub_is_asked_for_the_published_data_set(name, monkeypatch):
    import datasets

    asked = []

    def load(hub_name, split):
        asked.append((hub_name, split))
        return [ROWS[name]]

    monkeypatch.setattr(datasets, "load_dataset", load)
    benchmark = benchmarks.get(name)
    (item,) = benchmark.read(bad_rows=BadRows())
    assert asked == [(benchmark.hub_name, benchmark.splits[0])]
    assert item.place == f"{benchmark.hub_name}[{benchmark.splits[0]}] row 1"


def test_a_prompt_of_turns_stays_one(tmp_path):
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    asked = [*turns, {"role": "user", "content": "How are you?"}]
    path = write(tmp_path / "rows.jsonl", [rewardbench_row("hep-go", prompt=asked)])
    (item,), _ = read("rewardbench", path)
    assert item.prompt == asked
    with pytest.raises(DataError, match="its last turn must contain text"):
        read("rewardbench", write(tmp_path / "none.jsonl", [rewardbench_row("hep-go", prompt=[])]))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("columns", [TEXTS, PROMPTS], ids=["text", "prompt"])
def test_half_a_surrogate_pair_is_a_bad_row(name, columns, tmp_path):
    column = columns.get(name, "prompt")
    value = ROWS[name][column]
    spoilt = [f"{text}\ud800" for text in value] if isinstance(value, list) else f"{value}\ud800"
    with pytest.raises(DataError, match="has half a surrogate pair"):
        read(name, write(tmp_path / "rows.jsonl", [{**ROWS[name], column: spoilt}]))
