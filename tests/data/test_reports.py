from falign.data import BadRows, Example, Tokenized
from falign.data.reports import Tally
from falign.errors import DataError
from falign.scoring.batch import PromptTree

TREE = PromptTree((1,), ((2,),))


def example(prompt, *completions, preference=(1.0, 0.0)):
    return Example(prompt, completions, preference, "x")


def test_identical_rows_and_contradictions_are_counted_apart():
    tally = Tally(BadRows())
    for row in (
        example("q", "a", "b"),
        example("q", "a", "b"),  # identical
        example(" Q", "a", "b"),  # identical but for case and spacing of the prompt
        example("q", "b", "a", preference=(0.0, 1.0)),  # the same preference, written the other way round
        example("q", "b", "a"),  # contradiction
        example("q", "a", "c"),
        example("r", "a", "b"),
        example("q", "a", "b", "c", preference=(3.0, 2.0, 1.0)),
        example("q", "c", "b", "a", preference=(-1.0, 0.0, 9.0)),  # the same ranking
        example("q", "c", "b", "a", preference=(-1.0, 9.0, 0.0)),  # another ranking
        example("q", "a", preference=(1.0,)),
        example("q", "a", preference=(0.0,)),  # contradiction of labels
        example("q", "z", preference=None),
        example("q", "z", preference=None),  # identical
    ):
        tally.add(row)
    report = tally.report("x", "preference")
    assert (report.read, report.kept, report.duplicates, report.contradictions) == (14, 14, 5, 3)


def test_rows_add_up_and_counts_are_those_of_the_rows():
    bad_rows = BadRows("skip", keep=1)
    tally = Tally(bad_rows)
    bad_rows.add(DataError("x:1: first"))
    bad_rows.add(DataError("x:2: second"))
    done = (
        Tokenized(TREE, drifting_tokens=3),
        Tokenized(TREE, prompt_tokens_cut=5, completions_cut=2),
        Tokenized(TREE),
        Tokenized(None, drifting_tokens=1, dropped="long prompt"),
    )
    for number, tokenized in enumerate(done):
        tally.add(example(f"q{number}", "a", "b"), tokenized)
    report = tally.report("x.jsonl", "preference")
    assert report.counts() == [
        ("rows read", 6),
        ("bad rows", 2),
        ("dropped: long prompt", 1),
        ("rows kept", 3),
        ("prompts cut", 1),
        ("completions cut", 2),
        ("prompts that merge with an answer", 1),
        ("answers opened differently from the prompt", 0),
        ("distinct prompts", 4),
        ("duplicate rows", 0),
        ("contradicting rows", 0),
    ]
    assert report.messages == ("x:1: first",)
    assert report.drift_share == 1 / 3
