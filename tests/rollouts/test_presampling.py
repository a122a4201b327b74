import pytest

from falign.errors import ConfigError, RolloutError
from falign.json_lines import unsealed
from falign.rollouts import SamplingParams, TransformersEngine
from falign.rollouts.presampling import presampled_chunks
from falign.rollouts.presampling_journal import PresamplingJournal
from tests.models.tiny import tiny_model

PROMPTS = [[i, i + 1, 2 * i] for i in range(5, 26)]
PARAMS = SamplingParams(3, stop_token_ids=frozenset({1}))


def verify(prompts, rollouts):
    """The first token says it, and some prompts are hopeless."""
    return [i % 5 > 0 and r.completion_ids[0] % 4 > 0 for i, r in zip(prompts, rollouts, strict=True)]


@pytest.fixture(scope="module")
def engine():
    model = tiny_model("llama")
    engine = TransformersEngine(model, pad_token_id=1)
    engine.publish(model, 0)
    return engine


def run(engine, *, verify=verify, **changes):
    options = {"num_completions": 4, "threshold": 3, "params": PARAMS, "seed": 3, "chunk_size": 4, **changes}
    return list(presampled_chunks(engine, PROMPTS, verify, **options))


def test_prompts_are_split_by_their_correct_completions_and_one_more(engine):
    calls = []

    def counted(prompts, rollouts):
        flags = verify(prompts, rollouts)
        calls.append((prompts, [rollout.prompt_ids for rollout in rollouts], flags))
        return flags

    results = [result for chunk in run(engine, verify=counted) for result in chunk]
    assert len(results) == len(PROMPTS)
    correct = {i: [] for i in range(len(PROMPTS))}
    for prompts, ids, flags in calls:
        assert ids == [tuple(PROMPTS[i]) for i in prompts]
        for i, flag in zip(prompts, flags, strict=True):
            correct[i].append(flag)
    for i, result in enumerate(results):
        assert result.num_correct == sum(correct[i][:4])
        assert len(correct[i]) == 4 + (result.num_correct >= 3)
        assert (result.rehearsal is not None) == (correct[i][4:] == [True])
    kinds = {(result.num_correct >= 3, result.rehearsal is not None) for result in results}
    assert kinds == {(False, False), (True, False), (True, True)}
    kept = next(result.rehearsal for result in results if result.rehearsal)
    assert kept.prompt_ids in set(map(tuple, PROMPTS))
    assert len(kept.logprobs) == len(kept.completion_ids)


def test_a_chunk_is_what_it_is_without_those_before_it(engine):
    whole = run(engine)
    assert [len(chunk) for chunk in whole] == [4, 4, 4, 4, 4, 1]
    assert run(engine, start=8) == whole[2:]
    assert run(engine, seed=4) != whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 5}, "threshold=5 must be from 1 to num_completions=4"),
        ({"threshold": 0}, "threshold=0"),
        ({"params": SamplingParams(3, temperature=0.7)}, "temperature=0.7.* from the model itself"),
        ({"params": SamplingParams(3, top_k=5)}, "top_k=5"),
    ],
)
def test_what_would_give_no_sample_of_the_model_is_refused(engine, changes, message):
    with pytest.raises(RolloutError, match=message):
        run(engine, **changes)


def journal_of(path, **record):
    return PresamplingJournal(path, record={"model": "m", "seed": 3, **record}, chunk_size=4, num_prompts=len(PROMPTS))


@pytest.mark.parametrize("cut", [0, 1, 30, 2000, 100_000])
def test_a_journal_that_was_cut_anywhere_goes_on_to_the_same_findings(engine, tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    whole = journal_of(path)
    for chunk in run(engine):
        whole.append(chunk)
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    resumed = journal_of(path)
    assert len(resumed.findings) % 4 == 0 or len(resumed.findings) == len(PROMPTS)
    assert (len(resumed.findings) > 0) == (cut >= 2000)
    for chunk in run(engine, start=len(resumed.findings)):
        resumed.append(chunk)
    assert path.read_bytes() == content
    assert resumed.findings == whole.findings == journal_of(path).findings
    row = unsealed(content.splitlines()[1])
    assert set(row) == {"num_correct", "rehearsal"}


def test_a_journal_of_other_settings_is_not_gone_on_with(engine, tmp_path):
    path = tmp_path / "journal.jsonl"
    journal_of(path).append(run(engine)[0])
    with pytest.raises(ConfigError, match=r"seed \(3 there, 4 now\)"):
        journal_of(path, seed=4)
    assert len(journal_of(path).findings) == 4
