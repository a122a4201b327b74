"""Every constructor names a number that is given as a text."""

import inspect
import re

import pytest

from falign import methods
from falign.objectives import BinaryConstraint

REQUIRED = {"divergence": "jensen_shannon", "target": BinaryConstraint()}
NUMBER = re.compile(r"(float|int)( \| None)?")


def arguments():
    for name in methods.__all__:
        parameters = inspect.signature(getattr(methods, name)).parameters
        given = {key: REQUIRED.get(key, 2) for key, each in parameters.items() if each.default is each.empty}
        yield from ((name, key, given) for key, each in parameters.items() if NUMBER.fullmatch(str(each.annotation)))


@pytest.mark.parametrize(("name", "argument", "given"), list(arguments()))
def test_a_text_in_place_of_a_number_is_named(name, argument, given):
    with pytest.raises(ValueError, match=rf"^{argument}='0.3' is a str; it must be a (whole )?number\.$"):
        getattr(methods, name)(**given | {argument: "0.3"})
