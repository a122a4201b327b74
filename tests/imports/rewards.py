"""A reward in TRL's form, for runs that are imported."""


def short(completions, **columns):
    return [-float(len(each)) for each in completions]
