from hypothesis import given, strategies

from falign.report.tables import Html, tag
from tests.report.page_text import Page


@given(strategies.text(strategies.characters(codec=None), max_size=40))
def test_text_comes_out_as_it_went_in_and_opens_no_element(text):
    element = tag("p", text, attributes={"title": text})
    page = Page(element.encode("utf-8").decode("utf-8"))
    assert page.tags == ["p"]
    assert element.count("<") == 2
    written = "".join(
        c if c in "\t\n\r" or not (c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff") else "\ufffd" for c in text
    )
    assert "".join(page.text) == written
    assert page.attributes == [("p", "title", written)]


def test_markup_is_not_escaped_again():
    assert tag("b", Html("<i>x</i>"), "<") == "<b><i>x</i>&lt;</b>"
