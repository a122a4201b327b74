"""The columns of well-known data sets and libraries are read as they come; the samples are written anew."""

import json

import pytest

from falign.data import DataSource, InMemory, PromptSource, Window, check, load_preferences, load_prompts
from falign.data.files import Row
from falign.data.recognition import RowReader
from falign.divergences import get
from falign.errors import DataError
from falign.objectives import Listwise, Pairwise
from falign.rewards.forms import FORMS, arguments
from falign.training.data_check import check_data
from tests.models.tiny import tiny_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def answered(text, overall, fine=None, **further):
    return {"response": text, "overall_score": overall, "fine-grained_score": fine, "model": "m", **further}


BINARIZED = {
    "prompt": "Name a color.",
    "prompt_id": "0f",
    "chosen": [user("Name a color."), assistant("Blue.")],
    "rejected": [user("Name a color."), assistant("A table.")],
    "messages": [user("Name a color."), assistant("Blue.")],
    "score_chosen": 8.0,
    "score_rejected": 3.5,
}
ULTRAFEEDBACK = {
    "source": "flan",
    "instruction": "Name a color.",
    "models": ["a", "b", "c"],
    "completions": [
        answered("A table.", 2.0, custom_system_prompt="Be honest."),
        answered("Blue.", 9.0, custom_system_prompt="Be helpful."),
        answered("Bluish?", 5.0, custom_system_prompt="Be brief."),
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
NECTAR = {
    "prompt": "\n\nHuman: Hello \n\nAssistant: Hi. \n\nHuman: Name a color. \n\nAssistant: ",
    "answers": [
        {"answer": "Blue.", "model": "a", "rank": 1.0},
        {"answer": "Bluish?", "model": "b", "rank": 2.0},
        {"answer": "A table.", "model": "c", "rank": 3.0},
    ],
    "turns": 2,
    "num_responses": 3,
    "source": ["x"],
    "good_natured": True,
}
HELPSTEER = {
    "domain": "general",
    "language": "english",
    "context": [user("Hello"), assistant("Hi."), user("Name a color.")],
    "response1": "Blue.",
    "response2": "A table.",
    "overall_preference": -2,
    "individual_preference": [{"score": -2, "reasoning": "r", "feedback1": "f", "feedback2": "g"}],
}
HALOS_PAIR = {
    "prompt_id": 3,
    "prompt": [user("Name a color.")],
    "output_A": [assistant("A table.")],
    "output_B": [assistant("Blue.")],
    "label": 0,
    "reward_A": 0.1,
    "reward_B": 0.9,
    "reward_difference": 0.8,
    "type": "pairwise_feedback",
}
HALOS_BINARY = {
    "prompt_id": 3,
    "prompt": [user("Name a color.")],
    "output": [assistant("Blue.")],
    "label": 1,
    "reward": 0.9,
    "type": "binary_feedback",
}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [user("What is 2 + 2?")],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 0, "answer": "2 + 2 = 4 #### 4", "question": "What is 2 + 2?"},
}
READ = {
    "preference": (BINARIZED, ["Blue.", "A table."], (1.0, 0.0)),
    "ultrafeedback": (ULTRAFEEDBACK, ["A table.", "Blue.", "Bluish?"], (2.0, 9.0, 5.0)),
    "nectar": (NECTAR, ["Blue.", "Bluish?", "A table."], (-1.0, -2.0, -3.0)),
    "helpsteer3": (HELPSTEER, ["Blue.", "A table."], (1.0, 0.0)),
    "halos": (HALOS_PAIR, ["A table.", "Blue."], (0.0, 1.0)),
    "halos binary": (HALOS_BINARY, ["Blue."], (1.0,)),
}


@pytest.mark.parametrize("name", READ)
def test_rows_are_read_without_options_and_shown_by_a_check(name, write_rows):
    row, answers, preference = READ[name]
    source = DataSource(write_rows(row))
    tokenizer = tiny_tokenizer()
    report = check(source)
    assert (report.source.format, report.source.bad, report.source.kept) == (name.split()[0], 0, 1)
    (tree,) = load_preferences([source], tokenizer, stop_token_ids=(), window=Window(500)).train
    text = tokenizer.decode(tree.prompt_ids)
    assert "<s>userName a color.</s>" in text
    assert ("<s>userHello</s><s>assistantHi.</s>" in text) == (name in ("nectar", "helpsteer3"))
    written = [tokenizer.decode(ids) for ids in tree.completion_ids]
    assert written == [f"<s>assistant{answer}</s>" for answer in answers]
    assert tree.preference == preference


def test_system_prompts_of_single_answers_are_left_out_and_reported(write_rows):
    report = check(DataSource(write_rows(ULTRAFEEDBACK)))
    assert "completions.custom_system_prompt" in report.source.unused
    assert {"correct_answers", "models"} <= {*report.source.unused}


def test_other_scores_of_ultrafeedback_are_read_where_the_overall_one_is_missing():
    entries = [answered("a", None, 1.5), answered("b", 3.0, 4.5)]
    example = RowReader().read(Row("x:1", {**ULTRAFEEDBACK, "completions": entries}))
    assert example.preference == (1.5, 4.5)
    entries[0]["fine-grained_score"] = None
    with pytest.raises(DataError, match="no 'overall_score' and no 'fine-grained_score' for each response"):
        RowReader().read(Row("x:1", {**ULTRAFEEDBACK, "completions": entries}))


@pytest.mark.parametrize("strength", range(-3, 4))
def test_helpsteer_prefers_the_first_response_below_zero_the_second_above_and_none_at_zero(strength):
    example = RowReader().read(Row("x:1", {**HELPSTEER, "overall_preference": strength}))
    first, second = example.preference
    assert (first > second, second > first) == (strength < 0, strength > 0)
    assert (example.left_out is None) == (strength != 0)


def test_ties_are_dropped_and_counted_not_bad(write_rows):
    tie = {**HELPSTEER, "overall_preference": 0}
    equal = [answered("a", 5.0), answered("b", 5.0)]
    path = write_rows(HELPSTEER, tie)
    assert check(DataSource(path)).source.dropped == {"no answer is preferred": 1}
    data = load_preferences([DataSource(path)], tiny_tokenizer(), stop_token_ids=(), window=Window(500))
    assert (len(data.train), data.report.sources[0].dropped) == (1, {"no answer is preferred": 1})
    both = write_rows(ULTRAFEEDBACK, {**ULTRAFEEDBACK, "completions": equal})
    assert check(DataSource(both)).source.dropped == {"no answer is preferred": 1}


BAD = {
    "strength": ({**HELPSTEER, "overall_preference": 4}, "'overall_preference' is 4; it goes from -3"),
    "no strength": ({**HELPSTEER, "overall_preference": None}, "'overall_preference' is None; it must be a finite"),
    "label": ({**HALOS_PAIR, "label": 0.5}, r"'label' is 0.5; it must be 1 \(output_A is better\) or 0"),
    "rank": ({**NECTAR, "answers": [*NECTAR["answers"], {"answer": "x", "rank": None}]}, r"'rank' of 'answers\[3\]'"),
    "entries": ({**NECTAR, "answers": [*NECTAR["answers"], {"answer": "x"}]}, "must be a list of objects with answer"),
    "verl": (VERL, "a prompt without a completion, in verl's layout: give the source to an online run"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_that_cannot_be_read_are_named(name):
    row, message = BAD[name]
    with pytest.raises(DataError, match=message):
        RowReader().read(Row("x:1", row))


def test_verl_prompts_reach_rewards_and_verifiers_with_their_ground_truth(tmp_path):
    import datasets

    file = tmp_path / "train.parquet"
    other = {**VERL, "reward_model": {"style": "rule", "ground_truth": "5"}}
    datasets.Dataset.from_list([VERL, other]).to_parquet(file)
    data = load_prompts([PromptSource(str(file))], tiny_tokenizer(), max_length=200)
    assert [row.columns["answer"] for row in data.train] == ["4", "5"]
    first = data.train[0]
    assert first.columns["ground_truth"] == "4"
    assert first.prompt == VERL["prompt"]

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return float(solution_str == ground_truth)

    columns = {name: [value] for name, value in first.columns.items()}
    given = arguments(compute_score, "verl", [first.prompt], ["4"], columns)
    assert {name: values[0] for name, values in given.items()} == {
        "data_source": "openai/gsm8k",
        "solution_str": "4",
        "ground_truth": "4",
        "extra_info": VERL["extra_info"],
    }
    assert FORMS["verl"].value({"score": 1.0}) == 1.0
    found = check_data(str(file))
    (report,) = found.sources
    assert (report.source.format, report.source.kept, found.ok) == ("verl", 2, True)
    assert any("online run" in notice.text for notice in found.notices)
    rows = PromptSource("x", rows=InMemory([{**VERL, "reward_model": 4}]))
    with pytest.raises(DataError, match="'reward_model' is 4; it must be an object with 'ground_truth'"):
        load_prompts([rows], tiny_tokenizer(), max_length=200)


SEVERAL = {
    "plain": {"prompt": "Say: ", "chosen": "a", "rejected": ["b", "c"]},
    "turns": {
        "prompt": [user("Say")],
        "chosen": [assistant("a")],
        "rejected": [[assistant("b")], [assistant("c")]],
    },
    "implicit": {
        "chosen": [user("Say"), assistant("a")],
        "rejected": [[user("Say"), assistant("b")], [user("Say"), assistant("c")]],
    },
    "as text": {"prompt": "Say: ", "chosen": "a", "rejected": json.dumps(["b", "c"])},
    "alpaca": {"instruction": "Say", "chosen": "a", "rejected": ["b", "c"]},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_rejected_answers_make_one_row(name, write_rows):
    source = DataSource(write_rows(SEVERAL[name]), chat=False if name in ("plain", "as text") else None)
    tokenizer = tiny_tokenizer()
    (tree,) = load_preferences([source], tokenizer, stop_token_ids=(), window=Window(200)).train
    assert tree.preference == (1.0, 0.0, 0.0)
    ends = [tokenizer.decode(ids).removesuffix("</s>")[-1] for ids in tree.completion_ids]
    assert ends == ["a", "b", "c"]


def test_pairwise_compares_each_rejected_answer_and_listwise_takes_the_softmax_over_all():
    import torch

    from falign.objectives import CompletionBatch

    rewards = torch.tensor([[0.3], [0.1], [-0.2]], dtype=torch.float64)
    batch = CompletionBatch(
        logprobs=rewards,
        reference_logprobs=torch.zeros_like(rewards),
        completion_mask=torch.ones(3, 1, dtype=torch.bool),
        prompt_index=torch.zeros(3, dtype=torch.long),
        preference=torch.tensor([1.0, 0.0, 0.0]),
    )
    kl = get("reverse_kl")
    pairs = Pairwise(kl, beta=1.0)(batch).terms[0].losses
    assert pairs.tolist() == pytest.approx([-torch.sigmoid(torch.tensor(d)).log().item() for d in (0.2, 0.5)])
    (top,) = Listwise(kl, beta=1.0)(batch).terms[0].losses.tolist()
    assert top == pytest.approx(-rewards[:, 0].softmax(0)[0].log().item())


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        ([], "'rejected' is .*; it must have at least one answer|'rejected' is empty"),
        (["b", "a"], r"'chosen' and 'rejected\[1\]' are equal"),
        (["b", ""], r"'rejected\[1\]' is empty"),
    ],
)
def test_rejected_answers_that_cannot_be_used_are_named(rejected, message):
    with pytest.raises(DataError, match=message):
        RowReader().read(Row("x:1", {"prompt": "q", "chosen": "a", "rejected": rejected}))
