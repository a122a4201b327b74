"""Reward functions as users write them, in falign's form, TRL's and verl's."""

import asyncio


def of_trl(completions, answer, **kwargs):
    return [
        float(completion[0]["content"] == expected) for completion, expected in zip(completions, answer, strict=True)
    ]


def of_trl_in_lists(prompts, completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [float(len(content)) for content in contents]


def with_trainer_state(completions, trainer_state):
    return [0.0 for _ in completions]


def with_trainer_state_or_none(completions, trainer_state=None, log_metric=None):
    return [float(trainer_state is None and log_metric is None) for _ in completions]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth) + 10.0 * (data_source == "b") + (extra_info or {}).get("bonus", 0.0)


def compute_score_with_details(solution_str, ground_truth, **kwargs):
    return {"score": float(solution_str == ground_truth), "acc": 0.5}


async def compute_score_of_a_judge(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.001)
    return float(solution_str == ground_truth)


async def judged(completions, answer):
    await asyncio.sleep(0.001)
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def loop_of(completions):
    async def number():
        return id(asyncio.get_running_loop()) % 2**32

    async def all_of_them():
        return [float(await number()) for _ in completions]

    return all_of_them()


def parses(completions, answer):
    return [float(_number(completion) == expected) for completion, expected in zip(completions, answer, strict=True)]


def _number(text):
    return int(text)  # which raises where it is none


def at_once(completions):
    raise RuntimeError(f"{len(completions)} completions\x1b[31m at once")


def with_a_typo(completions, answr):
    return [0.0 for _ in completions]


def unnamed(completions, /):
    return [0.0 for _ in completions]


def leaves(completions):
    raise SystemExit(0)


async def leaves_later(completions):
    await asyncio.sleep(0)
    raise SystemExit("no judge")
