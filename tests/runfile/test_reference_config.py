import re
from pathlib import Path

import pytest
import yaml

from falign.errors import ConfigError
from falign.runfile import (
    AdapterOffConfig,
    AdapterReferenceConfig,
    AutoReferenceConfig,
    FrozenReferenceConfig,
    MovingAverageConfig,
    PeriodicResetConfig,
    SoupConfig,
    parse_run,
)

LEAST = {"output_dir": "run", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}


def with_reference(**fields):
    return {**LEAST, "reference": fields}


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({}, AutoReferenceConfig),
        ({"cache": "c"}, AutoReferenceConfig),
        ({"kind": "adapter_off"}, AdapterOffConfig),
        ({"kind": "frozen", "path": "x"}, FrozenReferenceConfig),
        ({"kind": "adapter", "path": "x", "cache": "c"}, AdapterReferenceConfig),
        ({"kind": "soup", "paths": ["a", "b"], "weights": [0.3, 0.7], "cache": "c"}, SoupConfig),
        ({"kind": "moving_average", "alpha": 0.6, "every": 64, "rank": 32, "cache": None}, MovingAverageConfig),
        ({"kind": "periodic_reset", "every": 64, "reset_optimizer": True}, PeriodicResetConfig),
    ],
)
def test_every_kind_is_read_with_its_fields_and_survives_being_written(fields, config):
    run = parse_run(with_reference(**fields))
    run.check()
    assert type(run.reference) is config
    assert {k: v for k, v in run.reference.model_dump(mode="json").items() if k in fields} == fields
    assert parse_run(run.model_dump(mode="json")) == run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "x"}, "reference.kind=auto has no such field, kind=frozen or kind=adapter has"),
        ({"kind": "adapter_off", "path": "x"}, "'reference.path': reference.kind=adapter_off has no such field"),
        ({"kind": "adapter"}, "reference.path is required"),
        ({"kind": "soup"}, "reference.paths is required"),
        ({"kind": "frozen", "paths": ["a"]}, "kind=frozen has no such field, kind=soup has"),
        ({"kind": "frozen", "alpha": 0.5}, "kind=frozen has no such field, kind=moving_average has"),
        ({"kind": "periodic_reset", "every": 3, "alpha": 0.5}, "kind=moving_average has"),
        ({"kind": "moving_average", "alpha": 0.5, "every": 0}, "reference.every=0"),
        ({"kind": "moving_average", "alpha": 0.0, "every": 4}, "reference.alpha=0.0"),
        ({"kind": "moving_average", "alpha": 0.5}, "reference.every is required"),
        (
            {"kind": "moving_average", "alpha": 0.5, "every": 4, "cache": "c"},
            "reference.cache='c': .*the log-probabilities of a moving reference change at every move",
        ),
        ({"kind": "periodic_reset", "every": 4, "cache": "c"}, "reference.cache='c': .*leave the cache out"),
        ({"ref_model_mixup_alpha": 0.5}, r"here it is reference.alpha \(with reference.kind=moving_average\)"),
        ({"kind": "moving_avrage"}, r"did you mean moving_average\? Choose one of auto, adapter_off, frozen, adapter"),
    ],
)
def test_a_field_that_a_kind_does_not_read_is_an_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(with_reference(**fields))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_reference(kind="soup", paths=["a"]), "reference: a soup of 1: give at least two"),
        (with_reference(kind="soup", paths=["a", "b"], weights=[0.5, 0.6]), r"reference: weights=.*sum to 1.1"),
        (with_reference(kind="soup", paths=["a", "b"], weights=[1.0]), "reference: 1 weights for 2 members"),
        ({**with_reference(kind="adapter", path="x"), "adapter": None}, "set reference.kind=frozen"),
        (
            {**with_reference(kind="moving_average", alpha=0.5, every=4, rank=8), "adapter": None},
            "reference.rank=8 with adapter=null",
        ),
    ],
)
def test_a_combination_that_cannot_work_is_refused_before_anything_is_loaded(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(data).check()


def test_the_lines_of_the_page_on_references_are_read():
    page = (Path(__file__).parents[2] / "docs" / "references.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]
    prompts = {"prompts": {"train": [{"path": "p", "chat": True}]}, "rollout": {"max_new_tokens": 8}}
    online = {**{name: value for name, value in LEAST.items() if name != "data"}, **prompts}
    runs = [parse_run({**(online if "'level': 'token'" in str(block) else LEAST), **block}) for block in blocks]
    sections = [run.references or {"reference": run.reference} for run in runs if run.check()]
    kinds = [tuple(each.kind for each in named.values()) for named in sections]
    single = ["frozen", "auto", "adapter", "soup", "moving_average", "periodic_reset"]
    several = [
        ("auto", "frozen"),
        ("adapter_off", "vllm"),
        ("geometric", "frozen", "adapter_off"),
        ("adapter_off",),
        ("auto", "frozen"),
    ]
    kept = [*((kind,) for kind in single), *several, ("my_references:Mine",)]
    assert kinds == kept


def test_what_an_initial_adapter_has_of_its_own_cannot_be_set_beside_it():
    run = parse_run({**LEAST, "adapter": {"init": "sft", "dropout": 0.1}})
    assert run.model_dump()["adapter"] == {"init": "sft", "dropout": 0.1}
    assert parse_run(run.model_dump(mode="json")) == run
    assert parse_run(LEAST).model_dump()["adapter"]["r"] == 16
    with pytest.raises(ConfigError, match="alpha, r cannot be set together with init, whose adapter has its own"):
        parse_run({**LEAST, "adapter": {"init": "sft", "r": 16, "alpha": 8}})


@pytest.mark.parametrize(
    ("reference", "adapter", "same"),
    [
        ({}, {}, True),
        ({}, None, True),
        ({}, {"init": "sft"}, True),
        ({"kind": "adapter_off"}, {"init": "sft"}, False),
        ({"kind": "frozen"}, {}, True),
        ({"kind": "frozen"}, {"init": "sft"}, False),
        ({"kind": "frozen", "path": "m"}, None, True),
        ({"kind": "frozen", "path": "other"}, None, False),
        ({"kind": "adapter", "path": "sft"}, {}, False),
        ({"kind": "adapter", "path": "./sft"}, {"init": "sft"}, True),
        ({"kind": "adapter", "path": "other"}, {"init": "sft"}, False),
        ({"kind": "soup", "paths": ["sft", "b"]}, {"init": "sft"}, False),
        ({"kind": "moving_average", "alpha": 0.5, "every": 4}, {"init": "sft"}, True),
        ({"kind": "periodic_reset", "every": 4}, None, True),
    ],
)
def test_where_policy_and_reference_should_be_one_model_at_first(reference, adapter, same):
    run = parse_run({**LEAST, "reference": reference, "adapter": adapter})
    assert run.reference_sections()["reference"].starts_as_policy(run) == same
