import json

import pytest

from falign.data import DataSource, read_examples
from falign.data.pairing import Pairing
from falign.data.samples import Sample, read_samples, same_prompt
from falign.errors import DataError


def samples(*rows):
    return [
        Sample(prompt, text, f"a.jsonl:{number}", reward=reward)
        for number, (prompt, text, reward) in enumerate(rows, start=1)
    ]


GROUP = samples(("p", "good", 2.0), ("q", "only", 0.0), ("p", "bad", -1.0), ("p", "fair", 1.0), ("t", "a", 1.0))
TIED = [*GROUP, *samples(("t", "b", 1.0))]


def read_back(rows, path, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_examples(DataSource(str(path), **options)))


def test_the_best_and_the_worst_of_a_prompt_are_its_pair(tmp_path):
    paired = Pairing().of_one(TIED)
    assert paired.left_out == {"alone": 1, "ties": 1}
    assert paired.first == {"alone": "a.jsonl:2", "ties": "a.jsonl:5"}
    (example,) = read_back(paired.rows, tmp_path / "pairs.jsonl")
    assert (example.prompt, example.completions, example.preference) == ("p", ("good", "bad"), (1.0, 0.0))
    assert (paired.prompts, paired.completions, paired.prompts_used) == (3, 6, 1)


def test_all_pairs_are_those_that_differ_by_the_margin(tmp_path):
    paired = Pairing("all_pairs", min_margin=1.5).of_one(TIED)
    found = [example.completions for example in read_back(paired.rows, tmp_path / "pairs.jsonl")]
    assert found == [("good", "bad"), ("fair", "bad")]


def test_a_ranked_list_has_the_rewards_as_scores(tmp_path):
    (example,) = read_back(Pairing("ranked").of_one(TIED).rows, tmp_path / "lists.jsonl")
    assert example.completions == ("good", "bad", "fair")
    assert example.preference == (2.0, -1.0, 1.0)


def test_best_of_n_is_a_demonstration_for_every_prompt(tmp_path):
    examples = read_back(Pairing("best").of_one(TIED).rows, tmp_path / "best.jsonl")
    assert [(each.prompt, each.completions) for each in examples] == [("p", ("good",)), ("q", ("only",)), ("t", ("a",))]


def test_equal_completions_are_one_with_the_mean_reward():
    paired = Pairing("ranked").of_one(samples(("p", "x", 1.0), ("p", "y", 0.5), ("p", "x", 0.5)))
    assert paired.rows[0]["scores"] == [0.75, 0.5]
    assert paired.left_out == {"duplicates": 1}


def test_what_cannot_be_trained_on_is_left_out_and_counted():
    group = [
        *GROUP[:4],
        Sample("p", "  ", "a.jsonl:8"),
        Sample("p", "endless", "a.jsonl:9", reward=9.0, truncated=True),
    ]
    paired = Pairing().of_one(group)
    assert paired.rows[0]["chosen"] == "good"
    assert paired.left_out == {"empty": 1, "truncated": 1, "alone": 1}
    assert Pairing(keep_truncated=True).of_one(group).rows[0]["chosen"] == "endless"


def test_one_model_is_chosen_over_another_without_rewards():
    ours = samples(("p", "a", None), ("q", "same", None), ("p", "b", None))
    theirs = samples(("q", "same", None), ("p", "c", None), ("p", "d", None))
    paired = Pairing().of_two(ours, theirs)
    assert [(row["chosen"], row["rejected"]) for row in paired.rows] == [("a", "c"), ("b", "d")]
    assert paired.left_out == {"equal": 1}
    everyone = Pairing("all_pairs").of_two(ours, theirs).rows
    assert [(row["chosen"], row["rejected"]) for row in everyone] == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]


def test_of_two_models_with_rewards_only_the_better_answer_is_chosen():
    ours = samples(("p", "a", 1.0), ("p", "b", 0.0), ("p", "c", 0.5))
    theirs = samples(("p", "d", 0.0), ("p", "e", 1.0), ("p", "f", 0.5))
    paired = Pairing().of_two(ours, theirs)
    assert [(row["chosen"], row["rejected"], row["chosen_reward"]) for row in paired.rows] == [("a", "d", 1.0)]
    assert paired.left_out == {"worse": 1, "ties": 1}


def test_prompts_and_completions_without_a_partner_are_refused_or_counted():
    ours, theirs = samples(("p", "a", None), ("p", "b", None), ("q", "c", None)), samples(("p", "d", None))
    with pytest.raises(DataError, match=r"a.jsonl:2: this completion has no partner .* allow_unmatched=True"):
        Pairing().of_two(ours, theirs)
    with pytest.raises(DataError, match=r"a.jsonl:3: this prompt has no partner"):
        Pairing("all_pairs").of_two(ours, theirs)
    paired = Pairing(allow_unmatched=True).of_two(ours, theirs)
    assert paired.left_out == {"unmatched_completions": 1, "unmatched_prompts": 1}
    assert paired.prompts == 2


def test_an_empty_answer_does_not_shift_its_neighbors():
    ours = samples(("p", "", None), ("p", "b", None))
    paired = Pairing().of_two(ours, samples(("p", "c", None), ("p", "d", None)))
    assert [(row["chosen"], row["rejected"]) for row in paired.rows] == [("b", "d")]
    assert paired.left_out == {"empty": 1}


def test_a_missing_reward_and_an_empty_result_are_errors_with_places():
    with pytest.raises(DataError, match=r"a.jsonl:2: the completion has no reward"):
        Pairing().of_one(samples(("p", "a", 1.0), ("p", "b", None)))
    with pytest.raises(DataError, match=r"a.jsonl:1: this completion has no reward, and others have"):
        Pairing().of_two(samples(("p", "a", None)), samples(("p", "b", 1.0)))
    with pytest.raises(DataError, match=r"No row can be made of 1 completions. Left out: prompts with a single .*: 1"):
        Pairing().of_one(samples(("p", "a", 1.0)))


def test_samples_are_read_from_lists_labels_and_columns(tmp_path):
    lists = tmp_path / "lists.jsonl"
    lists.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "scores": [1, 0]}) + "\n")
    assert [(each.completion, each.reward, each.index) for each in read_samples(DataSource(str(lists)))] == [
        ("a", 1.0, 0),
        ("b", 0.0, 1),
    ]
    rows = [
        {"prompt": [{"role": "user", "content": "p"}], "completion": "", "finish_reason": "stop"},
        {"prompt": "p", "completion": "b", "grade": 0.5, "finish_reason": "length", "answer": "7"},
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty, cut = read_samples(DataSource(str(file)), reward="grade")
    assert (empty.completion, empty.reward, empty.truncated) == ("", None, False)
    assert (cut.reward, cut.truncated, cut.columns["answer"]) == (0.5, True, "7")
    assert same_prompt(empty.prompt) != same_prompt(cut.prompt)
    rows[1]["grade"] = "high"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"samples.jsonl:2: 'grade' is 'high'; it must be a finite number"):
        list(read_samples(DataSource(str(file)), reward="grade"))
