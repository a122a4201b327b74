"""The Python door: train with objects of a program, and use what a run has trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falign.choices import shown
from falign.errors import ConfigError
from falign.runfile import AdapterConfig as Lora
from falign.runfile import parse_run
from falign.runfile.base_config import FrozenModel
from falign.runfile.objects import (
    each_section,
    is_section,
    measure_section,
    model_section,
    objective_section,
    reference_section,
    reward_sections,
    with_sources,
)
from falign.runs.loading import Given, OpenRun

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from falign.data import Text
    from falign.evaluation import ScoreTotals
    from falign.objectives import Measure, Objective
    from falign.references import Reference
    from falign.report import WrittenReport
    from falign.runs.export import Exported

__all__ = ["Lora", "Run", "load", "train"]

Section = Mapping[str, Any] | FrozenModel
"""A section of a run file, as a mapping or as its class."""

MakesReference = Callable[[Any], Any]
"""A function of the policy that returns its reference."""


class Run(OpenRun):
    """A run in its folder: its results, and the model that it has trained, which is loaded where it is asked for.

    It has ``path``, ``summary``, ``policy``, ``tokenizer`` and ``config``; ``falign.train`` and ``falign.load`` return
    it, and all functions that take a run accept it.
    """

    def sample(
        self,
        prompts: str | Sequence[Text],
        *,
        chat: bool | None = None,
        num_completions: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Return completions of prompts: ``falign.sample``."""
        from falign.evaluation.answering import sample

        return sample(
            self,
            prompts,
            chat=chat,
            num_completions=num_completions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )

    def score(
        self,
        data: Any,
        out: str | Path,
        *,
        max_length: int | None = None,
        bad_rows: str = "error",
        overwrite: bool = False,
    ) -> ScoreTotals:
        """Write the scores of completions: ``falign.score``."""
        from falign.evaluation.score_run import score

        return score(self, data, out, max_length=max_length, bad_rows=bad_rows, overwrite=overwrite)

    def export(
        self,
        format: str = "merged",
        *,
        out: str | Path | None = None,
        dtype: str = "auto",
        base: str | None = None,
        overwrite: bool = False,
        push: str | None = None,
        private: bool = False,
        license: str | None = None,
    ) -> Exported:
        """Write the model for other programs: ``falign.export``."""
        from falign.runs.export import export

        return export(
            self,
            format,
            out=out,
            dtype=dtype,
            base=base,
            overwrite=overwrite,
            push=push,
            private=private,
            license=license,
        )

    def report(self, out: str | Path | None = None) -> WrittenReport:
        """Write a page of the run: ``falign.report``."""
        from falign.report import write_report

        return write_report([self.path], out)


def load(
    path: str | Path,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
    reference: Reference | MakesReference | None = None,
    references: Mapping[str, Reference | MakesReference] | None = None,
    trust_code: bool = False,
) -> Run:
    """Return a run in its folder.

    Args:
        path: The run folder.
        model: The base that was trained, where it is in memory, or was changed since it was loaded. Its weights are
            compared with those that were trained, and left as they are.
        tokenizer: Its own; by default the one where the model was loaded from.
        objective: The objective, where it was an object that the run file only records. Its code is compared.
        reference: The reference, likewise; or the function that makes it.
        references: Those by name, likewise.
        trust_code: Whether code that the run folder names may run: functions, divergences, its model's own code.

    Raises:
        ConfigError: The path is not a run folder.
    """
    return Run(path, given=Given.of(model, tokenizer, objective, reference, references), trust_code=trust_code)


def train(
    model: str | Path | Section | PreTrainedModel,
    *,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    prompts: Any = None,
    objective: Objective | Section | None = None,
    reference: Reference | MakesReference | Section | None = None,
    references: Mapping[str, Reference | MakesReference | Section] | None = None,
    measures: Mapping[str, Measure | str] | None = None,
    adapter: Section | str | None = "lora",
    training: Section | None = None,
    rewards: Sequence[Callable[..., Any] | Section] | Callable[..., Any] | Section = (),
    rollout: Section | None = None,
    rehearsal: Section | None = None,
    critic: Section | None = None,
    sampling: Section | None = None,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] | TrainerCallback = (),
    resume: bool = False,
    new_rewards: bool = False,
    console: Console | None = None,
) -> Run:
    """Train, and return the run: everything that a run file says, with objects where it has names.

    The sections ``training``, ``rollout``, ``sampling`` ... are those of a run file, with the same fields, defaults and
    checks, as mappings or as their classes.

    Args:
        model: A name, a folder, a section ``model``, or a loaded model, which is left as it is.
        output_dir: The run folder.
        tokenizer: Of a loaded model; by default the one where it was loaded from.
        data: For offline runs: a ``Dataset``, a ``DataFrame``, a list of rows, the path of a file, or the section
            ``data``, whose sources may have ``rows`` in place of a ``path``: ``dict(train=dict(rows=..., chat=True),
            eval_size=100)``.
        prompts: For online runs, in place of ``data``, the same way; a list of texts is one, too.
        objective: An objective, or the section.
        reference: A ``falign.references.Reference`` that does not move, a function ``f(policy)`` that makes one, or
            the section; by default what the policy starts from.
        references: In place of ``reference``, those that the objective or a measure reads, by name.
        measures: Measures to log as ``measures/NAME``: objects, or names such as ``"divergence_to(jensen_shannon)"``.
        adapter: The section (``falign.Lora(r=16)``), ``"lora"`` for its defaults, or None to train all weights.
        training: The section: learning rate, steps, batches ...
        rewards: For online runs: functions ``f(prompts, completions, **columns) -> list[float]``, other rewards, or
            sections; ``dict(function=f, weight=0.5, name="short")`` gives a function with its weight.
        rollout: The section of online runs.
        rehearsal: The section of DPH-RL's stored completions.
        critic: The section of the value head, for ``advantage="gae"``.
        sampling: The section of prompts that are answered before and after.
        seed: Of everything random.
        callbacks: Callbacks of transformers.
        resume: Go on from the newest whole checkpoint of the same run. Objects are compared by their content: data by
            their token ids, models by their weights, functions by their code.
        new_rewards: With ``resume``: go on with rewards that were changed.
        console: Where progress is shown; standard error by default.

    Raises:
        ConfigError: An argument or a combination of them cannot work; with its name and the remedy.
        DataError: A row cannot be used.
        FalignError: Something else of the run cannot work.
    """
    from falign.training import train as run

    sections = {
        "output_dir": str(output_dir),
        "seed": seed,
        "model": model_section(model, tokenizer),
        "adapter": {} if adapter == "lora" else adapter,
        "data": None if data is None else with_sources(data),
        "prompts": None if prompts is None else with_sources(prompts, texts=True),
        "objective": _objective(objective),
        "reference": None if reference is None else reference_section(reference),
        "references": None if references is None else each_section("references", reference_section, references),
        "measures": None if measures is None else each_section("measures", measure_section, measures),
        "training": training,
        "rewards": reward_sections(rewards),
        "rollout": rollout,
        "rehearsal": rehearsal,
        "critic": critic,
        "sampling": sampling,
    }
    given = {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in sections.items()
        if value is not None or name == "adapter"
    }
    config = parse_run(given, place="falign.train")
    if new_rewards and not resume:
        raise ConfigError("`new_rewards` has no effect without `resume`: a new run uses its rewards as they are.")
    callbacks = _each_callback(callbacks)
    run(config, console=console, resume=resume, new_rewards=new_rewards, callbacks=callbacks)
    held = {name: getattr(config, name) for name in ("model", "objective", "data", "prompts", "rewards")}
    if config.reference.kind == "python":
        held["reference"] = config.reference
    if made := {name: each for name, each in config.references.items() if each.kind == "python"}:
        held["references"] = made
    return Run(config.output_dir, given=Given(held), trust_code=True)


def _each_callback(given: Any) -> Sequence[Any]:
    """Return a list of callbacks, or of the single one that is given."""
    from transformers import TrainerCallback

    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for each in several:
        if not (issubclass(each, TrainerCallback) if isinstance(each, type) else isinstance(each, TrainerCallback)):
            raise ConfigError(f"callbacks has {shown(each)}: give transformers.TrainerCallback objects.")
    return several


def _objective(value: Any) -> Any:
    return value if value is None or is_section(value) else objective_section(value)
