"""Preference oracles as users write them."""

VOWELS = "aeiou"


def longer(first, second):
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


async def later(first, second):
    return longer(first, second)


def more_vowels(prompts, first, second, **columns):
    def count(text):
        return sum(letter in VOWELS for letter in text)

    return [0.5 + 0.4 * ((count(a) > count(b)) - (count(a) < count(b))) for a, b in zip(first, second, strict=True)]


def with_answer(prompts, first, second, answer):
    return [0.5 for _ in first]


def that_fails(first, second):
    raise LookupError("no such judge")


def vowels(prompts, completions, **columns):
    return [float(sum(letter in VOWELS for letter in text)) for text in completions]
