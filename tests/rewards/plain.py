"""Rewards and verifiers of the tests; the processes import this file."""

import os
import subprocess
import sys
import time


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def matches(completions, answer, prompts):
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def returns_no_list(completions):
    return {}


def square(x):
    return x * x


def hang(seconds=3600.0):
    time.sleep(seconds)


def add(x, y=0):
    return x + y


def raises(message):
    raise KeyError(message)


def leaves(status=3):
    os._exit(status)


def allocates(size):
    return len(bytearray(size))


def loaded():
    return sorted({name.split(".")[0] for name in sys.modules})


def pid():
    return os.getpid()


def prints(text):
    print(text)
    return len(text)


def times_out():
    raise TimeoutError("too long")


def by_content(completion):
    """Return 1, hang or raise, as the completion says."""
    if completion == "hang":
        time.sleep(3600)
    if completion == "raise":
        raise ValueError("told to")
    return 1.0


def one_at_a_time(prompts, completions, answer):
    assert len(prompts) == len(completions) == len(answer) == 1
    return [by_content(completions[0]) * answer[0]]


class RowError(Exception):
    """As that of falign.rewards.verifiers, which is known by its name."""


def needs_content(completion, level):
    if level is None:
        raise RowError("no level")
    return float(completion[0] == "x")


def starts(file, how, end):
    """Start another process, write its number down, and end as told."""
    if how == "a fork":
        number = os.fork()
        if number == 0:
            os.setsid()
            time.sleep(3600)
    else:
        number = subprocess.Popen(["sleep", "3600"], start_new_session=how == "in its own session").pid
    file.with_suffix(".new").write_text(str(number))
    file.with_suffix(".new").rename(file)
    if end == "dies":
        os._exit(3)
    if end == "hangs":
        time.sleep(3600)
    return 1


async def waits(completions, answer):
    import asyncio

    await asyncio.sleep(0.01)
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]
