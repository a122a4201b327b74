"""Every field of the run file changes what is built: none is read and then forgotten.

A field added to a section needs a change here, or a reason why nothing can be built otherwise.
"""

import json
import re
from typing import Any, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel
from transformers import LlamaConfig, LlamaForSequenceClassification

from falign.errors import FalignError
from falign.judges import RATE, Judge, ScoreForm
from falign.models import add_lora, export_adapter, load_model, load_tokenizer
from falign.runfile import objective_config, parse_run, reward_config, target_config
from falign.runfile.base_config import PythonObject
from falign.runfile.config import RunConfig
from tests.models.tiny import VOCABULARY, fill_adapter, save_tiny, tiny_tokenizer
from tests.rollouts.loopback import Loopback
from tests.training.pairs import run_data, write_pairs
from tests.training.plan import describe, plan
from tests.training.prompts import online_data, write_prompts

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

NOTHING_TO_BUILD = {
    "RunConfig.output_dir": "a place: it says where the run is written, and nothing about what is computed",
    **dict.fromkeys(
        (
            "AutoReferenceConfig.kind",
            "AdapterReferenceConfig.kind",
            "SoupConfig.kind",
            "VLLMEngineConfig.kind",
            "TransformersEngineConfig.kind",
            "MovingAverageConfig.kind",
            "PeriodicResetConfig.kind",
            "ResetOnStallConfig.kind",
            "MixtureConfig.kind",
            "GeometricConfig.kind",
            "VLLMReferenceConfig.kind",
            "OwnReferenceConfig.kind",
        ),
        "the name of the variant; the other variants' kinds are changed, and RunConfig.reference",
    ),
    **dict.fromkeys(
        (
            *(f"PythonObjectiveConfig.{field}" for field in ("kind", "name", "code")),
            *(f"PythonMeasureConfig.{field}" for field in ("kind", "name", "code")),
            *(f"PythonWeightConfig.{field}" for field in ("kind", "name", "code")),
            *(f"PythonCallbackConfig.{field}" for field in ("kind", "name", "code")),
            *(f"PythonReferenceConfig.{field}" for field in ("kind", "name", "code", "cache", "cache_top_k", "prompt")),
            *(f"PythonRewardConfig.{field}" for field in ("kind", "name", "code", "weight", "form", "transform")),
        ),
        "the record of an object, from which nothing is built without the object: tests/test_python_door.py",
    ),
    **dict.fromkeys(
        ("DataConfig.num_proc", "DataConfig.cache"),
        "how tokens are made, and not which: tests/data/test_blocks.py",
    ),
    "ModelConfig.chat_template_kwargs": "of conversations, and rows here are plain texts: tests/data/test_blocks.py",
    "ClassifierConfig.revision": "of a repository on the Hub: a folder has one revision, and there is no network here",
    **dict.fromkeys(
        tuple(
            f"{kind}Config.{field}"
            for kind in ("MovingAverage", "PeriodicReset", "ResetOnStall", "Mixture", "Geometric", "VLLMReference")
            for field in ("cache", "cache_top_k")
        ),
        "there to say why it is refused: it can only be null",
    ),
}
"""Fields that are names only, each with the reason."""

MAY_REFUSE = frozenset(
    {"DataConfig.bad_rows", "PromptsConfig.bad_rows", "ClassifierConfig.device", "ImplicitConfig.device"}
)
"""Fields of which a value is that something is refused."""


def reached(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """All sections that a run file may have, by the names of their classes."""
    found: dict[str, type[BaseModel]] = {model.__name__: model}
    for field in model.model_fields.values():
        for inner in _sections(field.annotation):
            found |= {} if inner.__name__ in found else reached(inner)
    return found


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [each for inner in get_args(annotation) if get_origin(annotation) for each in _sections(inner)]


SECTIONS = reached(RunConfig)


class Changes(dict):
    """Of one section: how it is built, from what, and a change for each of its fields."""

    def __init__(self, base: dict[str, Any], /, **changes: Any) -> None:
        super().__init__(changes)
        self.base = base


class With:
    """A change that shows only beside other fields, of its own section or of the run."""

    def __init__(
        self, value: Any, run: dict[str, Any] | None = None, online: bool | None = None, **beside: Any
    ) -> None:
        self.value, self.run, self.online, self.beside = value, run or {}, online, beside


ADVANTAGES = ("None", "BatchMean", "LeaveOneOut", "GroupCentred", "GroupNormalised", "Gae")
BUILT_ALONE = {
    "AnchoredConfig": Changes(
        {}, divergence="jensen_shannon", beta=0.3, value=1.0, weighting="data", completions="all"
    ),
    "PairwiseConfig": Changes(
        {},
        divergence="jensen_shannon",
        beta=0.3,
        margin_loss="hinge",
        length_norm="token",
        weighting="data",
        entropy_weight=0.5,
    ),
    "ListwiseConfig": Changes({}, divergence="jensen_shannon", beta=0.3, length_norm="token"),
    "RewardModelConfig": Changes({}, centering=0.1, margin_loss="conservative(0.1)", margin="data"),
    "RankedRewardModelConfig": Changes({}, centering=0.1),
    "CloningConfig": Changes(
        {},
        completions="passed",
        pass_reward=With(0.5, completions="passed"),
        advantage="leave_one_out",
        weights=["difficulty_kernel"],
        reduction="sequence_mean",
    ),
    "DiscriminativeConfig": Changes({}, score="ratio", tau=2.0, pass_reward=0.5),
    "TrustRegionConfig": Changes(
        {}, divergence="jensen_shannon", beta=3.0, delta=0.1, level="sequence", reduction="sequence_mean"
    ),
    "SequenceMatchConfig": Changes({}, alpha=1.0, gamma=0.9),
    "UnpairedConfig": Changes(
        {},
        divergence="jensen_shannon",
        beta=0.3,
        desirable_weight=2.0,
        undesirable_weight=2.0,
        reference_point="zero",
    ),
    "TokenPairwiseConfig": Changes(
        {},
        divergence="jensen_shannon",
        beta=0.3,
        alpha=0.2,
        variant=1,
        weighting="activations",
        mask_l1=With(0.1, weighting="learned"),
    ),
    "PolicyGradientConfig": Changes(
        {"divergence": "reverse_kl", "beta": 0.1, "importance_reference": "teacher", "old_exponent": 0.5},
        divergence="forward_kl",
        beta=0.3,
        advantage="group_normalised",
        clip_low=0.1,
        clip_high=0.1,
        importance="token",
        level="token",
        credit=With("returns", level="token"),
        reduction="token_mean",
        value_coefficient=With(0.5, advantage="gae"),
        gamma=With(0.5, advantage="gae"),
        lam=With(0.5, advantage="gae"),
        weights=["difficulty_kernel"],
        penalty_weights=["dads"],
        importance_reference="draft",
        old_exponent=0.7,
    ),
    **{f"{name}Config": Changes({}) for name in ADVANTAGES},
    "AceConfig": Changes({}, alpha=0.5, length_norm="none", kernel="relu", cap=2.0),
    "StcrConfig": Changes({}, rate=0.1, pass_reward=0.5),
    "OwnAdvantageConfig": Changes({"kind": "tests.runfile.own_members:centred"}),
    "DifficultyKernelConfig": Changes({}, a=2.0, b=3.0, pass_reward=0.5),
    "DadsConfig": Changes({}, pass_reward=0.5),
    "EntropyGateConfig": Changes({"higher": "policy"}, higher="reference", reference="draft", other=0.5),
    "EntropyGapConfig": Changes({}, reference="draft"),
    "EntropyPrefixConfig": Changes({}, share=0.2),
    "FirstTokensConfig": Changes({"tokens": 3}, tokens=5),
    "QuantileFilterConfig": Changes(
        {"measure": "entropy", "keep": 0.5}, measure="entropy_of(teacher)", keep=0.2, minus="entropy", name="other"
    ),
    "OwnWeightConfig": Changes({"kind": "tests.runfile.own_members:Half", "share": 0.5}),
    "DistributionMatchingConfig": Changes(
        {"target": {"kind": "exponential", "beta": 1.0}},
        divergence="squared_hellinger",
        target={"kind": "binary"},
        baseline="none",
    ),
    "BinaryConfig": Changes({}),
    "ExponentialConfig": Changes({"beta": 1.0}, beta=2.0),
    "MomentsConfig": Changes({"moments": [0.5]}, moments=[0.7], lambdas=[0.3]),
    "ProductConfig": Changes({"targets": [{"kind": "binary"}]}, targets=[{"kind": "exponential", "beta": 1.0}]),
    "HybridConfig": Changes(
        {},
        divergence="forward_kl",
        coefficient=0.5,
        level="sequence",
        advantage="leave_one_out",
        clip_low=0.1,
        clip_high=0.1,
        importance="sequence",
        reduction="sequence_mean",
    ),
    "RehearsalConfig": Changes(
        {}, divergence="forward_kl", level="sequence", reduction="sequence_mean", reference="teacher"
    ),
    "DistillationConfig": Changes(
        {},
        divergence="jensen_shannon",
        measure="entropy",
        weights=["difficulty_kernel"],
        reference="tutor",
        level="token",
        credit="returns",
        temperature=2.0,
        importance="token",
        reduction="sequence_mean",
        completions="all",
    ),
    "SumConfig": Changes(
        {"terms": {"first": {"kind": "pairwise"}}}, terms={"first": {"kind": "listwise"}}, weights={"first": 0.5}
    ),
    "OwnObjectiveConfig": Changes({"kind": "tests.runfile.own_members:Margin", "wanted": 1.0}),
    "OwnTargetConfig": Changes({"kind": "tests.runfile.own_members:Tilted", "strength": 0.5}),
    "SupervisedConfig": Changes(
        {"divergence": "pearson_chi2", "beta": 0.1},
        divergence="chi2_kl",
        beta=0.3,
        max_weight=5.0,
        completions="chosen",
    ),
}
VERIFIER = {"timeout": 5.0, "failed": None}
SAMPLES = {"samples": "reference.jsonl"}
OF_TRANSFORM = {"samples": "reference2.jsonl", "column": "grade"}
PART = {"name": "other", "weight": 0.5, "transform": {"kind": "calibrated", **SAMPLES}}
BUILT_ALONE |= {
    "CalibratedTransformConfig": Changes(SAMPLES, **OF_TRANSFORM),
    "ExponentialTransformConfig": Changes({**SAMPLES, "t": 2.0}, **OF_TRANSFORM, t=-2.0),
    "BestOfNTransformConfig": Changes({**SAMPLES, "n": 2, "beta": 0.5}, **OF_TRANSFORM, n=3, beta=0.7),
    "WorstOfNTransformConfig": Changes({**SAMPLES, "n": 2, "beta": 0.5}, **OF_TRANSFORM, n=3, beta=0.7),
    "OwnTransformConfig": Changes({"kind": "tests.runfile.own_members:Times", "factor": 2.0}),
}
MEASURES = {
    "DivergenceToConfig": Changes(
        {"divergence": "forward_kl"}, divergence="jensen_shannon", reference="teacher", temperature=2.0
    ),
    "TopKConfig": Changes(
        {"divergence": "forward_kl", "k": 4},
        divergence="jensen_shannon",
        k=5,
        reference="teacher",
        tail="none",
        linear=With(1.0, tail="none"),
        stray=2.0,
        stray_top=With(3, stray=2.0),
        temperature=2.0,
    ),
    "EntropyConfig": Changes({}),
    "RankTopKConfig": Changes(
        *({"k": 4},),
        k=5,
        reference="teacher",
        weights="reference",
        target_first=True,
        whole=True,
        candidates="policy",
    ),
    "ExpectedConfig": Changes({"reference": "teacher"}, reference="other", base="initial", smallest=0.1, k=3),
    "ExpectedCostConfig": Changes({}, plus_target=True),
    "EntropyOfConfig": Changes({}, reference="teacher"),
    "DivergenceBetweenConfig": Changes(
        {"divergence": "forward_kl", "of": "draft", "to": "teacher"}, divergence="reverse_kl", of="other", to="another"
    ),
    "SurprisalConfig": Changes({}),
    "LogNormalizerConfig": Changes({}),
    "BalancedConfig": Changes(
        {"first": "surprisal", "second": "expected_cost"}, first="entropy", second="surprisal", largest=3.0
    ),
    "StandardizedConfig": Changes({"measure": "entropy"}, measure="surprisal", temperature=2.0),
    "TargetSplitConfig": Changes(
        {"divergence": "forward_kl"},
        divergence="jensen_shannon",
        reference="teacher",
        target_weight=0.5,
        others_weight=8.0,
        temperature=2.0,
        target_part="likelihood",
    ),
    "SinkhornConfig": Changes(
        {"block": 4}, block=5, reference="teacher", epsilon=0.2, iterations=5, temperature=2.0, plan="constant"
    ),
    "OwnMeasureConfig": Changes({"kind": "tests.runfile.own_members:MassOn", "ids": [3]}),
}

JUDGE = {"url": "http://127.0.0.1:9/v1", "model": "judge"}
PRICES = {"price_prompt": 1.0, "price_completion": 2.0}
BUILT_ALONE |= {
    "Endpoint": Changes(
        JUDGE,
        url="http://127.0.0.1:8/v1",
        model="other",
        api_key_env="PATH",
        temperature=0.5,
        max_tokens=64,
        seed=1,
        answer="text",
        options={"top_p": 0.5},
        reasks=3,
        timeout=9.0,
        retries=2,
        backoff=0.5,
        concurrency=2,
        cache="judge.sqlite",
        price_prompt=With(3.0, **PRICES),
        price_completion=With(3.0, **PRICES),
        budget=With(5.0, **PRICES),
    ),
}
REWARDS = {
    "OwnRewardConfig": Changes({"kind": "tests.runfile.own_members:Length", "wanted": 5}, **PART),
    "FunctionConfig": Changes(
        {"function": "tests.training.prompts:vowels"},
        **PART,
        function="tests.training.prompts:short",
        form="trl",
        timeout=3.0,
        failed=With(0.5, timeout=3.0),
        errors=With("count", timeout=3.0),
    ),
    "MathConfig": Changes({}, **PART, **VERIFIER, answer="solution", decimals=3),
    "NumberConfig": Changes({}, **PART, **VERIFIER, answer="solution", tolerance=0.1),
    "ChoiceConfig": Changes({}, **PART, **VERIFIER, answer="solution", letters="AB", options="options"),
    "RegexConfig": Changes({"pattern": "(a)"}, **PART, **VERIFIER, pattern="(b)", whole=True, answer="solution"),
    "SectionsConfig": Changes({"tags": ["think"]}, **PART, **VERIFIER, tags=["answer"]),
    "SqlConfig": Changes(
        {"root": "."}, **PART, **VERIFIER, root="..", database="{x}.db", answer="gold", max_rows=5, skip_empty=True
    ),
    "WordsConfig": Changes(
        {"words": ["a"]}, **PART, words=["b"], column=With("wanted", words=[], column="other"), mode="any"
    ),
    "LexiconConfig": Changes({"path": "a.txt"}, **PART, path="b.txt", output="mean"),
    "SentimentConfig": Changes(
        {"path": "a.jsonl", "positive": "good"},
        **PART,
        path="b.jsonl",
        positive="bad",
        output="mean",
        smoothing=0.5,
    ),
    "ClassifierConfig": Changes(
        {"path": "classifier", "label": 0},
        **PART,
        path="classifier2",
        text="completion",
        output="probability",
        label=1,
        max_length=16,
        tokens_per_batch=64,
        dtype="bfloat16",
        device="nowhere",
    ),
    "OracleConfig": Changes(
        {"function": "tests.rewards.judges:longer"},
        **PART,
        function="tests.rewards.judges:more_vowels",
        both_orders=False,
        samples="reference.jsonl",
    ),
    "JudgeConfig": Changes(
        {"endpoint": JUDGE},
        **PART,
        endpoint={**JUDGE, "model": "other"},
        scale=[0, 5],
        template="judge.yaml",
        reference="answer",
        failed=1.0,
    ),
    "JudgeOracleConfig": Changes(
        {"endpoint": JUDGE},
        **PART,
        endpoint={**JUDGE, "model": "other"},
        both_orders=False,
        samples="reference.jsonl",
        template="judge.yaml",
        reference="answer",
        failed=0.5,
    ),
    "ImplicitConfig": Changes(
        {"path": "tiny", "reference": "tiny2"},
        **PART,
        path="tiny2",
        reference="tiny",
        divergence="forward_kl",
        beta=0.3,
        layout="tree",
        tokens_per_batch=64,
        dtype="bfloat16",
        device="nowhere",
    ),
}
URL, OTHER_URL = "a server", "another server"
SCORING_URL, OTHER_SCORING_URL = "a scoring server", "another scoring server"
COLDER = {"prompts": 4, "completions": 4, "max_new_tokens": 8, "temperature": 0.5}
MOVING = {"every": 4}
EVALUATED = {"training": {"max_steps": 4, "learning_rate": 0.01, "eval_steps": 2}}
LONG = {"path": "long.jsonl", "chat": False}
HAS_VALUES = {"objective": {"kind": "policy_gradient", "advantage": "gae"}}
REHEARSES = {"objective": {"kind": "hybrid"}, "rehearsal": {"path": "rehearsal.jsonl", "completions": 2}}
HINT = "A hint. {prompt}"
TOP = With(4, cache="cache")
MEMBERS = {"references": {"a": {"kind": "frozen"}, "b": {"kind": "frozen", "path": "tiny2"}}}
TARGETED = {"kind": "distribution_matching", "target": {"kind": "exponential", "beta": 1.0}}
MOMENTS = {"kind": "distribution_matching", "target": {"kind": "moments", "moments": [0.5]}}
OF_A_RUN: dict[str, tuple[str, Changes]] = {
    "RunConfig": (
        "",
        Changes(
            {},
            seed=2,
            model={"path": "tiny2"},
            adapter=None,
            reference={"kind": "frozen"},
            references={"reference": {"kind": "frozen"}},
            data={"train": [{"path": "pairs2.jsonl", "chat": False}]},
            prompts=With({"train": [{"texts": ["another "], "chat": False}], "max_length": 64}, online=True),
            rollout=With({"prompts": 2, "completions": 3, "max_new_tokens": 8}, online=True),
            rewards=With([{"function": "tests.training.prompts:short"}], online=True),
            rehearsal=With({"path": "rehearsal2.jsonl"}, online=True, run=REHEARSES),
            critic=With({"heads": 2}, online=True, run=HAS_VALUES),
            objective={"kind": "listwise"},
            measures={"to_reference": "divergence_to(jensen_shannon)"},
            training={"learning_rate": 0.5, "max_steps": 8, "per_device_train_batch_size": 4},
            sampling={"prompts": ["question 2: "], "max_new_tokens": 4},
        ),
    ),
    "ModelConfig": (
        "model",
        Changes(
            {"path": "tiny"},
            path="tiny2",
            dtype="bfloat16",
            quantization="nf4",
            attn_implementation="eager",
            chat_template="{{ messages[0]['content'] }}",
            revision="main",
            trust_remote_code=With(True, path="own-code"),
            new_tokens=["<plan>"],
        ),
    ),
    "AdapterConfig": (
        "adapter",
        Changes(
            {},
            r=2,
            alpha=7.0,
            dropout=0.5,
            target_modules=["q_proj"],
            use_rslora=True,
            use_dora=True,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"q_proj": 3.0},
            init_lora_weights="olora",
            modules_to_save=["lm_head"],
            target_parameters=With(["experts.down_proj"], run={"model": {"path": "experts"}}),
            init="sft0",
        ),
    ),
    "AutoReferenceConfig": ("reference", Changes({}, cache="cache", cache_top_k=TOP, prompt=HINT)),
    "AdapterOffConfig": (
        "reference",
        Changes({"kind": "adapter_off"}, kind="frozen", cache="cache", cache_top_k=TOP, prompt=HINT),
    ),
    "FrozenReferenceConfig": (
        "reference",
        Changes(
            {"kind": "frozen"},
            kind="adapter_off",
            cache="cache",
            cache_top_k=TOP,
            prompt=HINT,
            path="tiny2",
            dtype=With("bfloat16", path="tiny2"),
            quantization=With("nf4", path="tiny2"),
        ),
    ),
    "OwnReferenceConfig": (
        "reference",
        Changes({"kind": "tests.references.own:Shifted", "shift": 0.5}, cache="cache", cache_top_k=TOP, prompt=HINT),
    ),
    "VLLMReferenceConfig": (
        "reference",
        Changes(
            {"kind": "vllm", "url": SCORING_URL},
            url=OTHER_SCORING_URL,
            model="other",
            timeout=9.0,
            wait=4.0,
            prompt=HINT,
        ),
    ),
    "AdapterReferenceConfig": (
        "reference",
        Changes({"kind": "adapter", "path": "sft0"}, cache="cache", cache_top_k=TOP, path="sft1", prompt=HINT),
    ),
    "SoupConfig": (
        "reference",
        Changes(
            {"kind": "soup", "paths": ["sft0", "sft1"]},
            cache="cache",
            cache_top_k=TOP,
            prompt=HINT,
            paths=["sft1", "sft1"],
            weights=[0.25, 0.75],
        ),
    ),
    "MovingAverageConfig": (
        "reference",
        Changes({"kind": "moving_average", "alpha": 0.5, **MOVING}, every=2, alpha=0.25, rank=5, prompt=HINT),
    ),
    "PeriodicResetConfig": (
        "reference",
        Changes(
            {"kind": "periodic_reset", **MOVING},
            every=2,
            reset_optimizer=True,
            prompt=HINT,
        ),
    ),
    "ResetOnStallConfig": (
        "reference",
        Changes(
            {"kind": "reset_on_stall", "patience": 3, "metric": "loss"},
            patience=With(2, run=EVALUATED),
            metric=With("rewards/margins", run=EVALUATED),
            min_improvement=With(0.5, run=EVALUATED),
            larger_is_better=With(False, run=EVALUATED),
            reset_optimizer=With(False, run=EVALUATED),
            prompt=With(HINT, run=EVALUATED),
        ),
    ),
    "MixtureConfig": (
        "references.reference",
        Changes(
            {"kind": "mixture", "weights": {"a": 0.5, "b": 0.5}},
            weights=With({"a": 0.25, "b": 0.75}, run=MEMBERS),
            prompt=With(HINT, run=MEMBERS),
        ),
    ),
    "GeometricConfig": (
        "references.reference",
        Changes(
            {"kind": "geometric", "weights": {"a": 1.5, "b": -0.5}},
            weights=With({"a": 1.25, "b": -0.25}, run=MEMBERS),
            prompt=With(HINT, run=MEMBERS),
            level=With("sequence", run={**MEMBERS, "objective": TARGETED}, online=True),
        ),
    ),
    "DataConfig": (
        "data",
        Changes(
            {"train": [{"path": "pairs.jsonl", "chat": False}], "max_length": 64},
            train=[{"path": "pairs2.jsonl", "chat": False}],
            eval=[{"path": "pairs2.jsonl", "chat": False}],
            eval_fraction=0.3,
            eval_size=4,
            max_length=With(20, long_prompt="cut"),
            max_completion_length=3,
            long_prompt=With("cut", train=[LONG], max_length=24, long_prompt="drop"),
            long_completion=With("drop", max_completion_length=8),
            bad_rows=With("error", train=[{"path": "bad.jsonl", "chat": False}], bad_rows="skip"),
        ),
    ),
    "SourceConfig": (
        "data.train.0",
        Changes(
            {"path": "pairs.jsonl", "chat": False},
            path="pairs2.jsonl",
            split=With("test", path="splits", chat=False),
            format=With("implicit", path="both.jsonl", chat=False, ignore=["question"]),
            columns=With(
                {"chosen": "rejected", "rejected": "chosen"}, path="both.jsonl", chat=False, ignore=["question"]
            ),
            chat=True,
            ignore=With(["system"], path="system.jsonl", chat=False),
            weight=With(
                3.0, run={"data": {"train": [..., {"path": "pairs2.jsonl", "chat": False, "weight": 1.0}]}}, weight=1.0
            ),
            limit=3,
        ),
    ),
    "TrainingConfig": (
        "training",
        Changes(
            {"max_steps": 4},
            learning_rate=0.5,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=3,
            gradient_accumulation_steps=2,
            num_train_epochs=3.0,
            max_steps=2,
            optim="sgd",
            weight_decay=0.1,
            adam_beta2=0.9,
            max_grad_norm=0.5,
            lr_scheduler_type="cosine",
            lr_scheduler_kwargs=With({"num_cycles": 2}, lr_scheduler_type="cosine"),
            warmup_steps=2.0,
            gradient_checkpointing=True,
            logging_steps=3,
            eval_steps=2,
            save_steps=2,
            save_total_limit=1,
            report_to="tensorboard",
            tokens_per_batch=100,
            layout="padded",
            chunk_tokens=3,
            skip_bad=True,
            log_completions=With(True, online=True, report_to="tensorboard"),
            extra={"adam_beta1": 0.8},
            master_weights=With("float32", run={"adapter": None, "model": {"path": "tiny", "dtype": "bfloat16"}}),
            save_minutes=5.0,
            early_stopping=With({"metric": "loss"}, eval_steps=2),
            keep_best=With("loss", eval_steps=2),
            callbacks=["tests.runfile.own_members:Watch"],
        ),
    ),
    "KeepBestConfig": (
        "training.keep_best",
        Changes({"metric": "loss"}, metric="rewards/margins", greater_is_better=True),
    ),
    "EarlyStoppingConfig": (
        "training.early_stopping",
        Changes({"metric": "loss"}, metric="rewards/margins", greater_is_better=True, patience=2, min_delta=0.1),
    ),
    "OwnCallbackConfig": (
        "training.callbacks.0",
        Changes({"kind": "tests.runfile.own_members:Watch"}, kind="tests.runfile.own_members:OtherWatch"),
    ),
    "SamplingConfig": (
        "sampling",
        Changes(
            {"prompts": ["question 1: "], "max_new_tokens": 6}, prompts=["other "], max_new_tokens=3, temperature=1.0
        ),
    ),
    "PromptsConfig": (
        "prompts",
        Changes(
            {"train": [{"path": "prompts.jsonl", "chat": False}], "max_length": 64},
            train=[{"path": "prompts2.jsonl", "chat": False}],
            eval=[{"path": "prompts2.jsonl", "chat": False}],
            eval_size=4,
            max_length=With(10, long_prompt="cut"),
            long_prompt=With("cut", train=[LONG], max_length=20, long_prompt="drop"),
            bad_rows=With("error", train=[{"path": "bad.jsonl", "chat": False}], bad_rows="skip"),
        ),
    ),
    "PromptSourceConfig": (
        "prompts.train.0",
        Changes(
            {"path": "prompts.jsonl", "chat": False},
            path="prompts2.jsonl",
            texts=With(["another "], path=None, texts=["one "]),
            split=With("test", path="splits", chat=False),
            template="{answer}? ",
            columns=With({"prompt": "question", "task": "prompt"}, path="both.jsonl", chat=False),
            chat=True,
            ignore=With(["system"], path="system.jsonl", chat=False),
            system="Be kind.",
            limit=3,
        ),
    ),
    "HorizonConfig": (
        "rollout.horizon",
        Changes({"start": 2, "by": 2, "every": 1}, start=3, by=1, every=2),
    ),
    "RolloutConfig": (
        "rollout",
        Changes(
            {"prompts": 4, "completions": 4, "max_new_tokens": 8},
            horizon={"start": 2, "by": 2, "every": 2},
            prompts=3,
            completions=3,
            max_new_tokens=5,
            temperature=0.5,
            updates=2,
            minibatches=2,
            ignore_stop=True,
            pass_reward=2.0,
            outcome=With("b", run={"rewards": [{"kind": "regex", "pattern": each, "name": each} for each in "ab"]}),
            difficulty={"low": 0.2, "high": 0.4},
            ranked=With("all", run={"objective": {"kind": "pairwise"}}),
            max_batch_tokens=16,
            fit_samples=With(16, run={"objective": MOMENTS}),
            evaluation={"completions": 3},
            engine={"kind": "vllm", "shared_dir": "shared", "url": URL},
            ahead=With(True, engine={"kind": "vllm", "shared_dir": "shared", "url": URL}),
            correction=With({"cap": 1.5}, updates=2),
        ),
    ),
    "DifficultyConfig": (
        "rollout.difficulty",
        Changes({"low": 0.3, "high": 0.7, "max_rounds": 2}, low=0.0, high=1.0, max_rounds=1),
    ),
    "CorrectionConfig": ("rollout.correction", Changes({"cap": 1.1}, cap=With(3.0, run={"rollout": COLDER}))),
    "VLLMEngineConfig": (
        "rollout.engine",
        Changes(
            {"kind": "vllm", "shared_dir": "shared", "url": URL},
            url=OTHER_URL,
            shared_dir="shared2",
            timeout=9.0,
            wait=4.0,
            sync="merged",
            max_gap=0.5,
        ),
    ),
    "OwnEngineConfig": (
        "rollout.engine",
        Changes({"kind": "tests.runfile.own_members:CountingEngine"}, kind="tests.runfile.own_members:Alone"),
    ),
    "EvaluationConfig": ("rollout.evaluation", Changes({"completions": 4}, completions=3, temperature=0.5)),
    "CriticConfig": (
        "critic",
        Changes(
            {"heads": 2},
            heads=With(1, run=HAS_VALUES),
            soft_min=With(0.5, run=HAS_VALUES),
            polyak=With(0.5, run=HAS_VALUES),
            warm_up=With(2, run=HAS_VALUES),
        ),
    ),
    "RehearsalDataConfig": (
        "rehearsal",
        Changes({"path": "rehearsal.jsonl", "completions": 2}, path="rehearsal2.jsonl", completions=3),
    ),
}
ONLINE = frozenset(
    {"PromptsConfig", "PromptSourceConfig", "RolloutConfig", "DifficultyConfig", "EvaluationConfig"}
    | {
        "CriticConfig",
        "HorizonConfig",
        "RehearsalDataConfig",
        "CorrectionConfig",
        "VLLMEngineConfig",
        "OwnEngineConfig",
    }
)
"""Sections of runs that sample their own completions."""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The working folder, with two models in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FALIGN_CACHE", str(tmp_path / "made"))
    for seed, name in enumerate(("tiny", "tiny2")):
        save_tiny(tmp_path / name, seed=seed)
    return tmp_path


def write_data(folder):
    write_pairs(folder / "pairs.jsonl", n=12)
    write_pairs(folder / "pairs2.jsonl", n=9)
    write_prompts(folder / "prompts.jsonl", n=8)
    write_prompts(folder / "prompts2.jsonl", n=5)
    pair = {"prompt": "Say a word: ", "chosen": "gladly", "rejected": "whatever"}
    rows = {
        "long": [pair, {**pair, "prompt": "a long prompt, which is cut or dropped: "}],
        "bad": [pair, {**pair, "prompt": ""}],
        "system": [{**pair, "system": "Be kind."}],
        "both": [{"prompt": "Say: ", "question": "Ask: ", "chosen": "We say yes.", "rejected": "We say no."}],
        "rehearsal": [{"prompt_ids": [40, 41], "completion_ids": [70, i, 1], "logprobs": [-5.0] * 3} for i in range(5)],
        "rehearsal2": [{"prompt_ids": [50], "completion_ids": [70, 1], "logprobs": [-4.0, -2.0]}],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "splits").mkdir()
    for name in ("train", "test"):
        (folder / "splits" / f"{name}.jsonl").write_text(json.dumps({**pair, "prompt": f"Of {name}: "}) + "\n")


def write_models(folder, names):
    """Write those of the models and adapters that are named."""
    for i, rank in enumerate((2, 3)):
        if f"sft{i}" in names:
            adapted = add_lora(load_model("tiny"), r=rank, alpha=2 * rank, seed=i)
            export_adapter(fill_adapter(adapted, seed=i), load_tokenizer("tiny"), folder / f"sft{i}")
    if "experts" in names:
        save_tiny(folder / "experts", "qwen3_moe")
    if "own-code" in names:
        save_tiny(folder / "own-code")
        file = folder / "own-code" / "config.json"
        config = json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
        file.write_text(json.dumps(config))
        code = "from transformers import LlamaForCausalLM\n\n\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
        (folder / "own-code" / "modeling_own.py").write_text(code)
    for i, name in enumerate(("classifier", "classifier2")):
        if name in names:
            torch.manual_seed(i)
            sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            config = LlamaConfig(vocab_size=VOCABULARY, num_labels=2, pad_token_id=1, **sizes)
            LlamaForSequenceClassification(config).save_pretrained(folder / name)
            tiny_tokenizer().save_pretrained(folder / name)


def write_words(folder):
    (folder / "judge.yaml").write_text("user: '{prompt} {completion} {first} {second} {form}'\n")
    for name, words in (("a", "good\t2\nbad\t-1\n"), ("b", "good\t3\n")):
        (folder / f"{name}.txt").write_text(words)
        write_samples(folder / f"reference{'' if name == 'a' else 2}.jsonl", best=len(words))
        rows = [{"text": f"{name} fine", "label": "good"}, {"text": "poor thing", "label": "bad"}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ALONE = BUILT_ALONE | MEASURES | REWARDS


def write_samples(path, best):
    rows = [{"prompt": "p", "completion": str(i), "reward": i * best, "grade": -i} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed_fields(table):
    return [(section, field) for section, changes in table.items() for field in changes]


RUNS = {name: changes for name, (_, changes) in OF_A_RUN.items()}


def test_every_field_of_every_section_has_a_change_or_a_reason():
    expected = {f"{name}.{field}" for name, model in SECTIONS.items() for field in model.model_fields}
    by_variant = {f"{name}.kind" for name in ALONE if "kind" in SECTIONS[name].model_fields}
    changed = {f"{name}.{field}" for name, field in changed_fields(ALONE | RUNS)}
    assert changed | by_variant | NOTHING_TO_BUILD.keys() == expected
    assert not changed & NOTHING_TO_BUILD.keys()


@pytest.mark.parametrize(
    "union",
    [
        objective_config.ObjectiveConfig,
        target_config.TargetConfig,
        reward_config.RewardConfig,
        reward_config.TransformConfig,
    ],
    ids=["objective", "target", "reward", "transform"],
)
def test_every_kind_builds_something_else(union, files):
    write_words(files)
    write_models(files, {"classifier"})
    sections = [each for each in _sections(union) if not issubclass(each, PythonObject)]
    built = [json.dumps(alone(section.__name__)) for section in sections]
    assert len(set(built)) == len(built) > 3


def alone(section, **changes):
    config: Any = SECTIONS[section].model_validate({**ALONE[section].base, **changes})
    if section in MEASURES:
        return describe(config.build("measures.mine"))
    if section in REWARDS:
        return describe(reward_config.build_rewards([config]))
    if section == "Endpoint":
        return describe(Judge(config, RATE, ScoreForm()))
    if section == "MomentsConfig":
        return describe(config.build(torch.tensor([[0.0], [0.4], [1.0]], dtype=torch.float64)))
    return describe(config.build())


@pytest.mark.parametrize(("section", "field"), changed_fields(ALONE))
def test_a_field_of_an_objective_or_a_reward_changes_what_is_built(section, field, files):
    write_words(files)
    write_models(files, {"classifier", "classifier2"} if section == "ClassifierConfig" else {})
    change = ALONE[section][field]
    change = change if isinstance(change, With) else With(change)
    before = alone(section, **change.beside)
    assert before == alone(section, **change.beside)
    try:
        after = alone(section, **{**change.beside, field: change.value})
    except FalignError:
        assert f"{section}.{field}" in MAY_REFUSE
    else:
        assert after != before


@pytest.fixture
def servers(files):
    """Return a function that puts the addresses of two servers, started at need, in place of their names."""
    started = {}

    def with_addresses(run):
        for name, rank in ((URL, 8), (OTHER_URL, 8), (SCORING_URL, 0), (OTHER_SCORING_URL, 0)):
            if repr(name) in str(run) and name not in started:
                started[name] = Loopback(files / "tiny", max_rank=rank, names=("base", "other")).start()
        text = json.dumps(run, default=str)
        for name, server in started.items():
            text = text.replace(json.dumps(name), json.dumps(server.url))
        return json.loads(text)

    yield with_addresses
    for server in started.values():
        server.stop()


@pytest.mark.parametrize(("section", "field"), changed_fields(RUNS))
def test_a_field_of_a_run_changes_its_plan(section, field, files, servers, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(files / "modules"))
    monkeypatch.syspath_prepend(str(files / "modules"))
    write_data(files)
    path, changes = OF_A_RUN[section]
    change = changes[field] if isinstance(changes[field], With) else With(changes[field])
    write_models(files, set(re.findall(r"[\w-]+", str([changes.base, change.beside, change.value]))))
    online = section in ONLINE if change.online is None else change.online
    base = run_of(files, path, {**changes.base, **change.beside}, change.run, online=online)
    if "cache" in change.beside:
        plan(parse_run(servers(base)))  # the first one fills the cache, for which the reference runs
    before = plan(parse_run(servers(base)))
    assert before == plan(parse_run(servers(base)))
    changed = run_of(files, path, {**changes.base, **change.beside, field: change.value}, change.run, online=online)
    try:
        after = plan(parse_run(servers(changed)))
    except FalignError:
        assert f"{section}.{field}" in MAY_REFUSE
    else:
        assert after != before


def run_of(files, path, values, beside, *, online):
    """A run file whose section at a path has just these values, beside other changes of the run."""
    make = online_data if online else run_data
    data = files / ("prompts.jsonl" if online else "pairs.jsonl")
    run = make(files / "tiny", data, files / "run", training={"max_steps": 4, "learning_rate": 0.01})
    if path.startswith("rehearsal"):
        run |= REHEARSES
    if path.endswith("train.0"):  # some of the files have few rows
        run["prompts" if online else "data"]["eval_size"] = 0
    run |= {name: value for name, value in beside.items() if name != "data"}
    if not path:
        return run | values
    if path.startswith("training."):
        run["training"] |= {"eval_steps": 2, "callbacks": [None]}
        run["training"] |= {} if path.endswith(".0") else {"callbacks": []}
    *sections, last = path.split(".")
    inner: Any = run
    for step in sections:
        inner = inner[int(step)] if step.isdigit() else inner.setdefault(step, {})
    if last.isdigit():
        inner[int(last)] = values
        inner += beside.get("data", {}).get("train", [])[1:]
    else:
        inner[last] = values
    return run
