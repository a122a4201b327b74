import gzip
import json

import pytest

from falign.errors import ConfigError, RewardError
from falign.rewards import Words


def value(reward, text, **columns):
    return reward(["p"], [text], **{name: [cell] for name, cell in columns.items()})[0]


@pytest.mark.parametrize(
    ("mode", "expected"), [("all", [1, 0, 0]), ("any", [1, 1, 0]), ("none", [0, 0, 1]), ("share", [1, 0.5, 0])]
)
def test_modes(mode, expected):
    reward = Words(words=["dog", "ball"], mode=mode)
    texts = ["The DOG has a ball.", "A dog.", "Dogs, balls; a football."]
    assert reward(["p"] * 3, texts) == expected


def test_words_have_boundaries_and_may_be_phrases_or_symbols():
    assert value(Words(words=["New York"]), "in new york, again") == 1.0
    assert value(Words(words=["New York"]), "in new yorkshire") == 0.0
    assert value(Words(words=["C++"]), "written in C++.") == 1.0
    assert value(Words(words=["a.c"]), "abc") == 0.0


def test_words_of_the_row_are_a_list_or_a_text():
    reward = Words(column="concepts")
    assert value(reward, "a dog and a ball", concepts=["dog", "ball"]) == 1.0
    assert value(reward, "a dog", concepts="dog ball") == 0.0
    with pytest.raises(RewardError, match=r"reward words, completion 0: column 'concepts' is \[\]; it must hold words"):
        value(reward, "a dog", concepts=[])
    with pytest.raises(RewardError, match="reward words reads the column 'concepts'"):
        value(reward, "a dog")


def test_words_come_from_one_place():
    for arguments in ({}, {"words": ["a"], "column": "b"}):
        with pytest.raises(ConfigError, match="give either words"):
            Words(**arguments)
    with pytest.raises(ConfigError, match="mode='most' is unknown"):
        Words(words=["a"], mode="most")


def test_real_sentences_rank_by_how_many_of_their_words_they_have(shared_data):
    with gzip.open(shared_data("commongen-lite/commongen_lite.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    concepts = [[word.rpartition("_")[0] for word in row["concept_set"]] for row in rows]
    means = {}
    for model in rows[0]["outputs"]:
        values = Words(column="c", mode="share")(["p"] * 320, [row["outputs"][model] for row in rows], c=concepts)
        means[model] = sum(values) / 320
    # Without inflections, whose forms count as other words.
    assert means["gpt-4-0613"] > means["Yi-6b-chat"]
    assert all(0.3 < mean < 0.9 for mean in means.values())


def test_a_topic_is_told_from_its_word_list(shared_data):
    topics = [json.loads(line) for line in shared_data("topic-control/topics.jsonl").read_text().splitlines()]
    space = next(topic["words"] for topic in topics if topic["topic"] == "space")
    assert Words(words=space, mode="any")(["p"] * 2, ["A planet of our galaxy.", "A shop."]) == [1.0, 0.0]
