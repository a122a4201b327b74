"""``falign sample --out`` and ``falign pairs`` as a user types them, from prompts to a trained run."""

import datetime
import json

import pytest
import yaml

import falign as package
from falign.evaluation import sampling_run
from falign.rollouts.journal import Journal

REWARDS = {"rewards": [{"kind": "words", "words": ["e", "a", "o", "s", "t", "1"], "mode": "share"}]}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}", "label": f"é{i}"} for i in range(6)])


@pytest.fixture
def sampled(falign, tiny, prompts, tmp_path):
    def run(name, *arguments):
        out = tmp_path / name
        status, table, err = falign(
            "sample", tiny, "--file", prompts, "--out", out, "--num-completions", 4, "--max-new-tokens", 6, *arguments
        )
        assert status == 0, err
        return out, table

    return run


def test_samples_have_the_prompt_as_read_and_do_not_depend_on_other_prompts(sampled, falign, tiny, tmp_path):
    file, table = sampled("samples.jsonl", "--seed", 3)
    rows = rows_of(file)
    assert len(rows) == 24
    assert [row["sample"] for row in rows[:5]] == [0, 1, 2, 3, 0]
    assert rows[0]["prompt"] == [{"role": "user", "content": "question 0"}]
    assert rows[4]["columns"] == {"label": "é1"}
    assert "24" in table
    one = write(tmp_path / "one.jsonl", [{"prompt": "question 5"}])
    found = package.write_samples(
        str(tiny), str(one), tmp_path / "again.jsonl", num_completions=4, max_new_tokens=6, seed=3
    )
    assert [row["completion"] for row in rows_of(tmp_path / "again.jsonl")] == [row["completion"] for row in rows[20:]]
    assert (found.prompts, found.completions) == (1, 4)
    assert found.truncated == sum(row["finish_reason"] == "length" for row in rows[20:])


def test_several_completions_are_printed_or_returned_in_order(falign, tiny):
    status, out, err = falign(
        "sample", tiny, "-p", "one", "-p", "two", "--num-completions", 2, "--temperature", 1, "--json",
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "one", "two", "two"]
    texts = package.sample(str(tiny), ["one", "two"], num_completions=2, temperature=1.0, max_new_tokens=4)
    assert texts == [line["completion"] for line in lines]


def test_rewards_are_written_and_pairs_are_made_of_them(sampled, falign, tiny, tmp_path):
    rewards = tmp_path / "rewards.yaml"
    rewards.write_text(yaml.safe_dump(REWARDS))
    file, table = sampled("samples.jsonl", "--rewards", rewards)
    rows = rows_of(file)
    assert all(isinstance(row["reward"], float) for row in rows)
    assert "mean reward" in table
    status, out, err = falign("pairs", file, "--out", tmp_path / "pairs.jsonl", "--keep-truncated")
    assert status == 0, err
    made = rows_of(tmp_path / "pairs.jsonl")
    by_prompt = {json.dumps(row["prompt"]): [] for row in rows}
    for row in rows:
        by_prompt[json.dumps(row["prompt"])].append(row["reward"] if row["completion"].strip() else None)
    for row in made:
        known = [value for value in by_prompt[json.dumps(row["prompt"])] if value is not None]
        assert (row["chosen_reward"], row["rejected_reward"]) == (max(known), min(known))
    # The same rewards, computed again by name instead of read from the column.
    again = tmp_path / "again.jsonl"
    summary = package.pairs(file, out=again, rewards=rewards, keep_truncated=True)
    assert rows_of(again) == made
    assert summary.rows == len(made)
    assert f"{summary.rows:,}" in out


def test_scores_of_a_run_rank_its_samples(sampled, falign, tiny, tmp_path):
    file, _ = sampled("samples.jsonl")
    scores = tmp_path / "scores.jsonl"
    status, _, err = falign("score", tiny, file, "--reference", tiny, "--out", scores, "--bad-rows", "skip")
    assert status == 0, err
    status, _, err = falign("pairs", file, "--rewards", scores, "--out", tmp_path / "p.jsonl", "--keep-truncated")
    assert status == 2
    assert "prompts with a tie" in err  # a model has no implicit reward over itself
    rows = rows_of(scores)
    write(scores, [{**row, "implicit_reward": float(row["num_tokens"])} for row in rows])
    lengths = {row["place"].rpartition(":")[2]: float(row["num_tokens"]) for row in rows}
    package.pairs(file, out=tmp_path / "ranked.jsonl", rewards=[scores], layout="ranked", keep_truncated=True)
    for row in rows_of(tmp_path / "ranked.jsonl"):
        assert set(row["scores"]) <= set(lengths.values())
    # Drawn again under the same name, with as many rows: the text of prompt or completion has changed.
    drawn = rows_of(file)
    usable = next(i for i, row in enumerate(drawn) if row["completion"].strip())
    for name in ("completion", "prompt"):
        write(file, [row | ({name: "another"} if i == usable else {}) for i, row in enumerate(drawn)])
        with pytest.raises(
            package.errors.DataError, match=rf"samples.jsonl:{usable + 1}: .*scores.jsonl has the score"
        ):
            package.pairs(file, out=tmp_path / "x.jsonl", rewards=scores)
    write(file, drawn)
    # Without hashes, as in files of earlier versions, with a remark.
    write(scores, [{key: value for key, value in row.items() if key != "text_sha256"} for row in rows_of(scores)])
    status, _, err = falign("pairs", file, "--rewards", scores, "--out", tmp_path / "old.jsonl", "--layout", "ranked",
                            "--keep-truncated")  # fmt: skip
    assert status == 0, err
    assert "no column text_sha256, so scores were matched by file and row only" in err
    write(scores, rows_of(scores)[1:])
    with pytest.raises(package.errors.DataError, match=r"samples.jsonl:1: .*scores.jsonl has no score"):
        package.pairs(file, out=tmp_path / "x.jsonl", rewards=scores)
    with pytest.raises(package.errors.DataError, match="there is no column 'place', so this is not a file of"):
        package.pairs(file, out=tmp_path / "x.jsonl", rewards=file)


def test_pairs_of_two_models_train_a_run_as_they_are(sampled, falign, tiny, tmp_path):
    ours, theirs = sampled("ours.jsonl")[0], sampled("theirs.jsonl", "--seed", 1, "--temperature", 2)[0]
    status, _, err = falign("pairs", ours, theirs, "--out", tmp_path / "pairs.jsonl", "--keep-truncated")
    assert status == 0, err
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "run"),
                "model": {"path": str(tiny)},
                "data": {"train": [{"path": str(tmp_path / "pairs.jsonl")}]},
                "objective": {"divergence": "jensen_shannon", "beta": 0.1},
                "training": {"learning_rate": 1e-4, "max_steps": 1, "per_device_train_batch_size": 2},
            }
        )
    )
    status, _, err = falign("train", run_file)
    assert status == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-completions", 2, "-p", "x"], "--num-completions 2 with --temperature 0"),
        (["-p", "x", "--rewards", "r.yaml"], "--rewards: this has no effect without --out"),
        (["-p", "x", "--threshold", 1], "--threshold: this has no effect without --verifier"),
        (["-p", "x", "--out", "x.jsonl"], "--out writes the samples of --file"),
        (["--file", "prompts.jsonl", "--out", "x.csv"], "the suffix '.csv' is unknown"),
    ],
)
def test_options_without_effect_are_refused(falign, tiny, arguments, message):
    status, _, err = falign("sample", tiny, *arguments)
    assert (status, message in err) == (2, True), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "best", "--min-margin", 1], "--min-margin 1.0 has no effect with --layout best"),
        (["b.jsonl", "--layout", "ranked"], "--layout ranked compares completions of one file: leave the second out"),
        (["--allow-unmatched"], "--allow-unmatched has no effect without a second file"),
        (["--layout", "triples"], "--layout 'triples' is unknown"),
        (["--out", "a.jsonl", "--overwrite"], "is a file of samples"),
        ([], "a.jsonl:1: the completion has no reward"),
    ],
)
def test_wrong_pairs_are_refused(falign, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "x"}, {"prompt": "p", "completion": "y"}])
    write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "z"}])
    out = [] if "--out" in arguments else ["--out", "out.jsonl"]
    status, _, err = falign("pairs", "a.jsonl", *arguments, *out)
    assert (status, message in err) == (2, True), err


def test_each_of_several_rewards_has_its_column_and_dates_are_text(tiny, tmp_path):
    rows = [{"prompt": "p", "day": datetime.date(2026, 1, 2)}]

    def length(completions):
        return [float(len(text)) for text in completions]

    def one(completions):
        return [1.0 for _ in completions]

    rewards = [dict(function=length, weight=2.0), one]
    file = tmp_path / "samples.jsonl"
    found = package.write_samples(str(tiny), rows, file, num_completions=3, rewards=rewards, max_new_tokens=4)
    written = rows_of(file)
    for row in written:
        assert row["reward/length"] == len(row["completion"])
        assert row["reward"] == 2 * row["reward/length"] + row["reward/one"]
        assert row["columns"] == {"day": "2026-01-02"}
    assert found.mean_reward == pytest.approx(sum(row["reward"] for row in written) / 3)
    assert found.distinct == len({row["completion"] for row in written})


def test_rewards_in_a_table_may_be_text(tmp_path):
    file = tmp_path / "samples.csv"
    file.write_text("prompt,completion,reward\np,a,0.5\np,b,1e-1\n")
    package.pairs(file, out=tmp_path / "pairs.jsonl")
    assert rows_of(tmp_path / "pairs.jsonl")[0]["chosen_reward"] == 0.5
    file.write_text("prompt,completion,reward\np,a,high\n")
    with pytest.raises(
        package.errors.DataError, match=r"samples.csv:2: 'reward' is 'high'; it must be a finite number"
    ):
        package.pairs(file, out=tmp_path / "x.jsonl")


def test_a_stopped_call_goes_on_to_the_same_file(tiny, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling_run, "PROMPTS_PER_CALL", 4)
    options = {"num_completions": 2, "max_new_tokens": 4}
    package.write_samples(str(tiny), prompts, tmp_path / "whole.jsonl", **options)
    extend = Journal.extend

    def stopped(journal, entries):
        extend(journal, entries)
        raise KeyboardInterrupt

    file, partial = tmp_path / "samples.jsonl", tmp_path / ".samples.jsonl.partial.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "extend", stopped)
        with pytest.raises(KeyboardInterrupt):
            package.write_samples(str(tiny), prompts, file, **options)
    assert not file.exists()
    with pytest.raises(package.errors.ConfigError, match=r"another sampling: seed \(0 there, 1 now\)"):
        package.write_samples(str(tiny), prompts, file, **options, seed=1)
    assert package.write_samples(str(tiny), prompts, file, **options).resumed == 4
    assert rows_of(file) == rows_of(tmp_path / "whole.jsonl")
    assert not partial.exists()


def test_scores_are_those_of_the_same_file_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def scored(file, rewards):
        rows = [{"place": f"{file}:{n}", "completion": 0, "implicit_reward": r} for n, r in enumerate(rewards, 1)]
        return write(tmp_path / f"{file[0]}-{len(list(tmp_path.iterdir()))}-scores.jsonl", rows)

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(
            tmp_path / folder / "samples.jsonl",
            [{"prompt": "p", "completion": folder}, {"prompt": "q", "completion": folder}],
        )
    files = "a/samples.jsonl", "b/samples.jsonl"
    ours, theirs = scored(files[0], [2.0, 0.5]), scored(files[1], [1.0, 1.5])
    package.pairs(*files, out="p.jsonl", rewards=[ours, theirs])
    (row,) = rows_of(tmp_path / "p.jsonl")
    assert (row["prompt"], row["chosen_reward"], row["rejected_reward"]) == ("p", 2.0, 1.0)
    # The path may be written in another way if the name is enough.
    package.pairs(*files[:1], out="best.jsonl", rewards=scored("c/../samples.jsonl", [2.0, 0.5]), layout="best")
    assert [row["reward"] for row in rows_of(tmp_path / "best.jsonl")] == [2.0, 0.5]

    refused = [
        (files, [ours], r"b/samples.jsonl:1: .* has scores of a/samples.jsonl:1, another file of this name"),
        (files[:1], [ours, theirs], r"has scores of 2 completions that are not among the samples"),
        (
            files[:1],
            [scored(files[0], [1.0, 2.0, 3.0])],
            r"scores of 1 completions .*\(the first is a/samples.jsonl:3\)",
        ),
        (files[:1], [scored(files[0], [1.0, None])], r"-scores.jsonl:2: implicit_reward is None; it must be a finite"),
    ]
    for sources, rewards, message in refused:
        with pytest.raises(package.errors.DataError, match=message):
            package.pairs(*sources, out="x.jsonl", rewards=rewards, layout="pairs" if len(sources) > 1 else "best")
    write(tmp_path / "again.jsonl", [{"place": "a/samples.jsonl:1", "completion": 0, "implicit_reward": 7.0}])
    with pytest.raises(package.errors.DataError, match=r"a/samples.jsonl:1 has the score 7.0 here and 1 before"):
        package.pairs(files[0], out="x.jsonl", rewards=[scored(files[0], [1.0, 2.0]), "again.jsonl"], layout="best")


def test_options_of_rewards_without_effect_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "x", "reward": 1.0, "label": True}])
    write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "y", "reward": 2.0, "label": False}])
    write(tmp_path / "bare.jsonl", [{"prompt": "p", "completion": "z"}])
    refused = [
        (("a.jsonl", "b.jsonl"), {"reward_column": "rewrad"}, r"a.jsonl:1: there is no column 'rewrad'.*'reward'\]"),
        (("a.jsonl",), {"reward_column": "rewrad", "layout": "best"}, "there is no column 'rewrad'"),
        (("a.jsonl",), {"rewards": "scores.jsonl", "reward_column": "score"}, "reward_column='score' has no effect"),
        (("bare.jsonl", "bare.jsonl"), {"min_margin": 0.5}, "min_margin=0.5 compares rewards, and the samples have"),
    ]
    for sources, options, message in refused:
        with pytest.raises(package.errors.FalignError, match=message):
            package.pairs(*sources, out="x.jsonl", **options)
