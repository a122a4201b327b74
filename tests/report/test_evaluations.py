import pytest

from falign.errors import ConfigError
from falign.evaluation.summaries import RewardSummary, SampleSummary, read_evaluations
from tests.report.summaries import add_summary, rewards_summary, samples_summary


def test_both_kinds_are_read_and_plain_numbers_have_no_interval(tmp_path):
    add_summary(tmp_path, samples_summary(name="b"))
    add_summary(tmp_path, rewards_summary(name="a"))
    first, second = read_evaluations(tmp_path)
    assert isinstance(first, RewardSummary)
    assert first.scorers["implicit_reward"].calibration.ece.value == 0.0871
    assert first.scorers["implicit_reward"].calibration.ece.low is None
    assert isinstance(second, SampleSummary)
    assert second.metrics["reward"].low == pytest.approx(0.7113)
    assert second.frontier.ideal["jensen_shannon"][2].divergence == float("inf")


def test_without_reference_the_first_scorer_stands_in(tmp_path):
    scorers = {"logprob": {"scores": {"score": 0.5}}, "random": {"scores": {"score": 0.4}}}
    add_summary(tmp_path, rewards_summary(scorers=scorers))
    assert read_evaluations(tmp_path)[0].main_scorer == "logprob"


def test_where_a_subset_is_missing_the_plain_mean_stands_for_the_score(tmp_path):
    scorers = {"implicit_reward": {"scores": {"hard": 0.2, "accuracy": 0.61}}}
    add_summary(tmp_path, rewards_summary(scorers=scorers, missing_subsets=["Manual"]))
    (found,) = read_evaluations(tmp_path)
    assert found.scorers["implicit_reward"].whole == "accuracy"
    assert RewardSummary.model_validate(rewards_summary()).scorers["length"].whole == "score"


def test_samples_are_compared_where_prompts_and_rewards_are_the_same_whatever_their_source_is_called():
    def measured_on(source, **record):
        record = {"prompts": "a1", "rewards": [{"kind": "words"}], "max_new_tokens": 40, "weights": source, **record}
        return SampleSummary.model_validate(samples_summary(source=source, record=record)).measured_on

    assert measured_on("held-out prompts of x") == measured_on("held-out prompts of y")
    assert measured_on("x") != measured_on("x", prompts="b2")
    assert measured_on("x") != measured_on("x", rewards=[])


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        (rewards_summary(kind="reward"), "kind"),
        (rewards_summary(num_items="many"), r"rewards\.num_items"),
        (samples_summary(metrics={"reward": {"low": 1.0}}), r"samples\.metrics\.reward\.value"),
    ],
)
def test_another_form_is_refused_with_file_and_place(tmp_path, summary, message):
    file = add_summary(tmp_path, summary)
    with pytest.raises(ConfigError, match=rf"{file}: .*{message}"):
        read_evaluations(tmp_path)


def test_a_damaged_summary_is_named(tmp_path):
    file = add_summary(tmp_path, rewards_summary())
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ConfigError, match=r"summary.json is damaged .*evaluate again"):
        read_evaluations(tmp_path)


def test_a_folder_in_place_of_a_summary_is_damage(tmp_path):
    (tmp_path / "evaluation" / "rewards" / "summary.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"summary.json is damaged"):
        read_evaluations(tmp_path)
