import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from falign.errors import ConfigError
from falign.rewards import Lexicon, OwnFunction, RewardSum, TimedFunction, Verifier, Words, mathematics, sql
from falign.runfile.reward_config import RewardConfig, build_rewards
from tests.models.tiny import save_tiny

KINDS = [get_args(kind)[0] for kind in get_args(get_args(RewardConfig)[0])]


class Holder(BaseModel):
    rewards: list[RewardConfig]


def build(*rows: dict[str, Any]) -> RewardSum:
    return build_rewards(Holder(rewards=list(rows)).rewards)


def test_a_list_of_rewards_becomes_their_sum():
    total = build(
        {"function": "tests.rewards.plain:length", "weight": 0.5},
        {"kind": "words", "words": ["b"], "mode": "none", "name": "no-b"},
    )
    assert [(part.name, part.weight) for part in total.rewards] == [("length", 0.5), ("no-b", 1.0)]
    assert total.rewards[0].reward == OwnFunction("tests.rewards.plain:length")
    assert total(["p", "p"], ["aa", "b"]).total == [2.0, 0.5]


@pytest.mark.parametrize("row", [{}, {"timeout": 2.0}, {"timeout": 2.0, "failed": None, "errors": "count"}])
def test_a_function_written_out_can_be_read_back(row):
    held = Holder.model_validate({"rewards": [{"function": "tests.rewards.plain:length", **row}]})
    assert Holder.model_validate(held.model_dump(mode="json")) == held


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"kind": "math", "answer": "gold", "decimals": 3, "timeout": 2.0, "failed": None}, Verifier),
        ({"kind": "number", "tolerance": 0.1}, Verifier),
        ({"kind": "choice", "letters": "ABCD", "options": "options"}, Verifier),
        ({"kind": "regex", "pattern": "a", "whole": True}, Verifier),
        ({"kind": "sections", "tags": ["think"]}, Verifier),
        ({"kind": "words", "column": "concepts"}, Words),
        (
            {"kind": "function", "function": "tests.rewards.plain:length", "timeout": 1.0, "errors": "count"},
            TimedFunction,
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_each_kind_builds_its_reward_with_every_field(row, kind):
    reward = build(row).rewards[0].reward
    assert isinstance(reward, kind)
    fields = vars(reward)
    given = {**fields, **fields.get("columns", {}), **fields.get("parameters", {})}
    for key, value in row.items():
        assert key == "kind" or given[key] == value, key


def test_mathematics_and_sql_are_those_of_the_package(tmp_path):
    assert build({"kind": "math"}).rewards[0].reward == mathematics()
    expected = sql(tmp_path, database="{name}.db", answer="gold", max_rows=5, skip_empty=True, timeout=3.0)
    row = {"database": "{name}.db", "answer": "gold", "max_rows": 5, "skip_empty": True, "timeout": 3.0}
    assert build({"kind": "sql", "root": str(tmp_path), **row}).rewards[0].reward == expected
    with pytest.raises(ConfigError, match="is not a folder; give the one that holds the databases"):
        build({"kind": "sql", "root": str(tmp_path / "none")})


def test_word_lists_and_labelled_texts_are_read(tmp_path):
    (tmp_path / "words.txt").write_text("good\t2\n")
    rows = [{"text": "good fun", "label": "pos"}, {"text": "bad fun", "label": "neg"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    total = build(
        {"kind": "lexicon", "path": str(tmp_path / "words.txt"), "output": "mean"},
        {"kind": "sentiment", "path": str(tmp_path / "texts.jsonl"), "positive": "pos", "smoothing": 0.5},
    )
    lexicon, sentiment = (part.reward for part in total.rewards)
    assert lexicon == Lexicon({"good": 2.0}, output="mean")
    # (1 + 1/2)/(2 + 3/2) against (1/2)/(2 + 3/2)
    assert sentiment(["p"], ["good"]) == pytest.approx([1.0986123])


def test_models_are_loaded(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.models.tiny import VOCABULARY, tiny_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    row = {"kind": "classifier", "path": str(tmp_path / "classifier"), "output": "probability", "device": "cpu"}
    values = [build({**row, "label": label}).rewards[0].reward(["p"], ["c"])[0] for label in ("LABEL_0", "LABEL_1")]
    assert sum(values) == pytest.approx(1.0)

    paths = {"path": str(save_tiny(tmp_path / "a")), "reference": str(save_tiny(tmp_path / "b", seed=1))}
    implicit = build({"kind": "implicit", "beta": 2.0, "device": "cpu", **paths}).rewards[0].reward
    assert (implicit.beta, implicit.divergence.name) == (2.0, "reverse_kl")
    with pytest.raises(ConfigError, match="no closed form under total_variation"):
        build({"kind": "implicit", "divergence": "total_variation", "device": "cpu", **paths})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "maths"}, "maths"),
        ({"kind": "math", "pattern": "a"}, "Extra inputs are not permitted"),
        ({"kind": "regex"}, "Field required"),
        (
            {"function": "tests.rewards.plain:length", "errors": "count"},
            "errors applies to single completions, so it needs",
        ),
        ({"function": "tests.rewards.plain:length", "failed": -1.0}, "failed applies to single completions"),
        ({"kind": "math", "timeout": 0}, "greater than 0"),
    ],
)
def test_a_wrong_field_is_an_error(row, message):
    with pytest.raises(ValidationError, match=message):
        Holder(rewards=[row])


def test_a_reward_that_cannot_be_built_is_a_config_error():
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        build({"function": "no_such_module:f"})
    with pytest.raises(ConfigError, match="give either words"):
        build({"kind": "words"})
    with pytest.raises(ConfigError, match="the name 'math' comes twice"):
        build({"kind": "math"}, {"kind": "math", "answer": "other"})
    with pytest.raises(ConfigError, match="the list is empty"):
        build()


def test_the_run_file_lines_of_the_page_are_valid_and_its_table_names_every_kind_and_field():
    text = (Path(__file__).parents[2] / "docs/rewards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        Holder(**yaml.safe_load(block))
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text, re.MULTILINE)
    models = {model.model_fields["kind"].default: model for model in KINDS}
    for without_name in ("python", "module:Name"):  # an object of a program, and one of your own
        del models[without_name]
    table = {kind: set(re.findall(r"`(\w+)`", fields)) for kind, fields in rows if kind in models}
    assert list(table) == list(models)
    general = {"kind", "name", "weight", "timeout", "failed", "errors", "transform"}
    values = {"all", "any", "none", "share"}
    for kind, fields in table.items():
        known = set(models[kind].model_fields)
        assert fields - values <= known, kind
        if kind not in ("classifier", "implicit"):  # whose rows end in an ellipsis
            assert known - general <= fields, kind
