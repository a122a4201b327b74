"""Inputs of a sample evaluation: the run's settings, the policy with its reference, the rewards and the prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from falign.data import InMemory, PromptRow, PromptSource, load_prompts, read_examples
from falign.data.reports import BadRows
from falign.errors import ConfigError, DataError
from falign.evaluation.completion_scorer import CompletionScorer
from falign.evaluation.loading import Scored, load_alone, load_run, positions_of
from falign.evaluation.sample_options import SampleOptions
from falign.evaluation.sample_scorer import ScoredReward
from falign.models import load_model, load_tokenizer, model_identity
from falign.models.heads import share_head
from falign.models.tokenizers import check_same_tokens, pad_token_id
from falign.objectives import complete
from falign.references import REFERENCE, FrozenModel
from falign.rewards import RewardSum, WeightedReward
from falign.rewards.combination import row_check
from falign.rewards.identity import reward_identities
from falign.runfile import RunConfig
from falign.runfile.base_config import PythonObject
from falign.runfile.config import DataConfig
from falign.runfile.objects import reward_sections
from falign.runfile.reading import load_reward_list, parse_rewards
from falign.runfile.reward_config import RewardConfig, build_rewards
from falign.runs import RunFolder
from falign.runs.inputs import prompt_digest
from falign.runs.loading import Named, OpenRun, chosen_chat, is_run, named
from falign.runs.named_code import code_of_rewards, import_from, is_recorded, named_code, read_run, require_trust
from falign.scoring import Scorer
from falign.training.parts import Language, load_language

__all__ = [
    "LoadedRewards",
    "check_tokens",
    "given_rewards",
    "held_out_prompts",
    "load_policy",
    "load_rewards",
    "prompts_digest",
    "prompts_to_sample",
    "read_config",
]


def read_config(options: SampleOptions) -> RunConfig | None:
    """Return the settings of the run, with the objects that replace some of them; None for a model.

    Raises:
        ConfigError: The run file is damaged, or names code that is not trusted.
    """
    if not is_run(options.model):
        return None
    # The run's own rewards are built only if no others are given.
    uses = ["model", "objective", "reference", "references", *(["rewards"] if options.rewards is None else [])]
    config = read_run(RunFolder.open(options.model), uses=uses, trust_code=options.trust_code)
    if named_code(config, uses):
        import_from(Path.cwd())
    return config if options.given is None else options.given.in_place(config, path=Path(options.model))


class LoadedRewards(NamedTuple):
    """Rewards of completions.

    Attributes:
        rewards: The rewards.
        record: A value that identifies them.
        tokenizers: Tokenizers of those models among them that read token ids, by the models' paths.
    """

    rewards: RewardSum
    record: Any
    tokenizers: Mapping[str, Any]


def load_rewards(options: SampleOptions, config: RunConfig | None) -> LoadedRewards:
    """Return the rewards of a file or a run, or the run's own.

    Args:
        options: Its `rewards` are a YAML file, a run, or rewards in memory.
        config: The evaluated run; None for a model.

    Raises:
        FalignError: There are no rewards, or one of them cannot be loaded.
    """
    if options.rewards is None:
        if config is None or config.prompts is None:
            reason = "is not a run folder" if config is None else "was trained on preferences"
            raise ConfigError(
                f"{options.model} {reason} and has no rewards: give `rewards`, a YAML file with a list of them, or a "
                "run whose implicit reward to use."
            )
        if not config.rewards:
            raise ConfigError(
                f"{options.model} was trained without rewards: give `rewards`, a YAML file with a list of them, or a "
                "run whose implicit reward to use."
            )
        if lost := [
            str(each.name) for each in config.rewards if isinstance(each, PythonObject) and not each.is_in_memory
        ]:
            raise ConfigError(
                f"{options.model} was trained with rewards that were objects in a program ({', '.join(lost)}), which "
                "its folder cannot hold: give `rewards`."
            )
        return _built(config.rewards, config.rollout.outcome)
    return given_rewards(options.rewards, trust_code=options.trust_code)


def given_rewards(given: Any, *, trust_code: bool = False) -> LoadedRewards:
    """Return the rewards that are named or in memory.

    Args:
        given: A YAML file with a list of them, a run, or rewards in memory.
        trust_code: Whether code that a run folder names may run.

    Raises:
        FalignError: One of them cannot be loaded.
    """
    if not isinstance(given, str | Path | OpenRun):
        return _built(parse_rewards(reward_sections(given), place="rewards"))
    if isinstance(given, OpenRun) or is_run(str(given)):
        return _rewards_of_run(given, trust_code=trust_code)
    return _rewards_of_file(Path(given), trust_code=trust_code)


def _rewards_of_run(run: Named, *, trust_code: bool) -> LoadedRewards:
    """Return the rewards of an online run, or the implicit reward of an offline run."""
    path, given, trust_code = named(run, trust_code=trust_code)
    folder = RunFolder.open(path)
    config = read_run(folder, uses=[], trust_code=False)
    if config.prompts is not None:
        config = read_run(folder, uses=["rewards"], trust_code=trust_code)
        if named_code(config, ["rewards"]):
            import_from(Path.cwd())
        rewards = config.rewards if given is None else given.sections.get("rewards", config.rewards)
        if not rewards:
            raise ConfigError(f"{path} was trained without rewards: name another run, or a YAML file with a list.")
        return _built(rewards, config.rollout.outcome)
    scored = load_run(path, max_length=None, given=given, trust_code=trust_code)
    assert scored.reference is not None
    scorer = CompletionScorer(
        policy=scored.policy,
        reference=scored.reference,
        objective=scored.objective,
        scorer=Scorer(pad_token_id=pad_token_id(scored.tokenizer), chunk_tokens=scored.chunk_tokens),
        references=scored.references,
    )
    rewards = RewardSum((WeightedReward("implicit", ScoredReward(scorer)),))
    return LoadedRewards(rewards, scored.record, {path: scored.tokenizer})


def _rewards_of_file(file: Path, *, trust_code: bool) -> LoadedRewards:
    """Return the rewards that a file lists.

    The file may be the ``run.yaml`` of a run folder, which may come from someone else, so its code needs trust.
    """
    listed = load_reward_list(file)
    code = code_of_rewards(listed)
    if is_recorded(file):
        require_trust(code, place=file, trust_code=trust_code)
    if code:
        import_from(file.parent, Path.cwd())
    return _built(listed)


def _built(configs: Sequence[RewardConfig], outcome: str | None = None) -> LoadedRewards:
    paths = [path for config in configs for _, path in config.models_that_read_ids()]
    tokenizers = {path: load_tokenizer(path) for path in paths}
    rewards = build_rewards(configs, outcome=outcome)
    listed = [config.model_dump(mode="json") for config in configs]
    return LoadedRewards(rewards, {"listed": listed, "identities": reward_identities(rewards)}, tokenizers)


def check_tokens(model: str, tokenizer: Any, rewards: LoadedRewards) -> None:
    """Refuse rewards whose models would read the policy's token ids as other tokens.

    Raises:
        ConfigError: A token has different ids; the message names both models and the token.
    """
    for path, other in rewards.tokenizers.items():
        check_same_tokens(tokenizer, other, f"{model} and {path}")


def load_policy(options: SampleOptions, config: RunConfig | None) -> Scored:
    """Return the policy with the reference to compare it with: the requested model, or the run's own if it has one.

    Args:
        options: All options.
        config: The run; None for a model.

    Raises:
        FalignError: A model is missing, or the reference has other tokens than the policy.
    """
    other, dtype = options.comparison.reference, options.dtype or "auto"
    if config is not None:
        # Samples are scored by log-probabilities alone, so the other references that the objective reads are left out.
        own = REFERENCE in config.reference_sections() and other is None
        scored = load_run(
            options.model,
            max_length=None,
            any_objective=True,
            references=[REFERENCE] if own else [],
            checkpoint=options.checkpoint,
            given=options.given,
            trust_code=options.trust_code,
        )
    else:
        scored = load_alone(options.model, dtype=dtype, max_length=2)  # samples have no window
    if other is None:
        return scored
    check_same_tokens(scored.tokenizer, load_tokenizer(other), f"{options.model} and {other}")
    device = next(scored.policy.parameters()).device
    model = load_model(other, dtype=dtype, device=device)
    share_head(scored.policy, model)
    identity = model_identity(model)
    reference = FrozenModel(
        model, weights=identity["weights"], config=identity["config"], chunk_tokens=scored.chunk_tokens
    )
    kept = {name: value for name, value in scored.record.items() if not name.startswith("reference.")}
    replaced = {f"reference.{name}": value for name, value in reference.identity().items()}
    return scored._replace(reference=reference, record={**kept, **replaced})


def prompts_to_sample(
    options: SampleOptions, config: RunConfig | None, scored: Scored, rewards: RewardSum, console: Console
) -> tuple[list[PromptRow], str]:
    """Return the prompts, all of which every reward can score, and the name of their source.

    Args:
        options: The requested prompts; the run's held-out prompts if there are none.
        config: The run; None for a model.
        scored: The policy, whose tokenizer encodes the prompts and whose positions bound them.
        rewards: The rewards.
        console: Shows how plain text is read, and held-out prompts that are left out.

    Raises:
        ConfigError: The run has no such prompts, or a prompt leaves no room for a completion.
        DataError: A prompt cannot be read, or a reward cannot score its completions.
    """
    if options.prompts.prompts is not None:
        return _given_prompts(options, config, scored, rewards, console)
    assert config is not None
    rows = held_out_prompts(
        RunFolder.open(options.model), config, notify=lambda text: console.print(text, style="yellow", markup=False)
    )[: options.prompts.limit]
    for row, reason in zip(rows, row_check(rewards)(rows), strict=True):
        if reason is not None:
            raise DataError(f"{row.place}: {reason}. Fix the row, or give prompts=FILE.")
    return rows, f"held-out prompts of {options.model}"


def _given_prompts(
    options: SampleOptions, config: RunConfig | None, scored: Scored, rewards: RewardSum, console: Console
) -> tuple[list[PromptRow], str]:
    given, max_new_tokens = options.prompts, options.sampling_settings(config)["max_new_tokens"]
    positions = positions_of(scored.policy)
    room = sys.maxsize if positions is None else positions - max_new_tokens
    of_run = None if config is None else config.chat
    chat = chosen_chat(of_run if given.chat is None else given.chat, scored.tokenizer, console)
    rows = None if isinstance(given.prompts, str | Path) else InMemory(given.prompts)
    place = str(given.prompts) if rows is None else rows.path
    source = PromptSource(place, split=given.split, template=given.template, chat=chat, limit=given.limit, rows=rows)
    data = load_prompts(
        [source], scored.tokenizer, max_length=room, long_prompt="drop", skip_by=None, check=row_check(rewards)
    )
    if data.report.dropped:
        raise ConfigError(
            f"{place}: {data.report.dropped} prompts are longer than {room} tokens, which is what "
            f"max_new_tokens={max_new_tokens} leaves of the {positions} positions of {options.model}: lower it, or "
            "shorten the prompts."
        )
    return data.train, place


def held_out_prompts(folder: RunFolder, config: RunConfig, *, notify: Callable[[str], None]) -> list[PromptRow]:
    """Return the prompts that a run has held out and not trained on; each prompt of an offline run once.

    The run folder records which prompts were held out. The data may have changed since, and splitting them again could
    give other prompts.

    Args:
        folder: The run.
        config: Its run file.
        notify: Called with a message if held-out prompts were also trained on.

    Raises:
        ConfigError: The run has held out no prompts, or its data lack some of them now.
        DataError: The data are missing.
    """
    section, recorded = "data.eval" if config.prompts is None else "prompts.eval", folder.read_rows()
    held_out = {prompt for prompt, _ in recorded.rows.get(section, ())}
    wanted = held_out - recorded.trained_prompts
    if not wanted:
        reason = f"trained on all {len(held_out)} prompts that it held out" if held_out else "has held out no prompts"
        raise ConfigError(f"{folder.path} {reason}: give prompts=FILE.")
    if len(wanted) < len(held_out):
        notify(f"{len(held_out) - len(wanted)} of {len(held_out)} held-out prompts were trained on too: left out")
    language = load_language(config, date=folder.read_date())
    if config.prompts is None:
        assert config.data is not None
        loaded = _prompts_of_preferences(config, config.data, language)
    else:
        data = config.prompts.build(language.tokenizer, seed=config.seed)
        loaded = [*data.eval, *data.train]
    found = [(prompt_digest(row.prompt_ids), row) for row in loaded]
    if missing := len(wanted - {digest for digest, _ in found}):
        raise ConfigError(
            f"{folder.path}: {missing} of the {len(wanted)} prompts that it held out are not in its data any more: "
            "restore the files, or give prompts=FILE."
        )
    return [row for digest, row in found if digest in wanted]


def _prompts_of_preferences(config: RunConfig, data: DataConfig, language: Language) -> list[PromptRow]:
    """Return each prompt of preference data once, under the place of its first row."""
    preferences = "pairs" in complete(config.check()).preference_kinds
    loaded = data.build(
        language.tokenizer, stop_token_ids=language.stop_tokens, seed=config.seed, preferences=preferences
    )
    texts = {}
    for source in (*data.train, *data.eval):
        for example in read_examples(source.build(), bad_rows=BadRows("skip")):
            texts[example.place] = example.prompt
    # A later entry replaces an earlier one, so the rows are read backward to keep the first of each prompt.
    rows = {tree.prompt_ids: tree for tree in reversed([*loaded.eval, *loaded.train])}
    return [PromptRow(texts[tree.place], ids, {}, tree.place) for ids, tree in reversed(rows.items())]


def prompts_digest(prompts: Sequence[PromptRow]) -> str:
    """Return a digest of prompts and of the columns that rewards read."""
    digest = sha256()
    for row in prompts:
        digest.update(json.dumps([row.prompt_ids, row.columns], sort_keys=True, default=str).encode())
    return digest.hexdigest()
