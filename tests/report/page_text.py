"""A page as a browser reads it: balanced tags, attributes, and text."""

from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "path", "use"}


class Page(HTMLParser):
    def __init__(self, markup):
        super().__init__()
        self.open, self.attributes, self.text, self.ids, self.tags = [], [], [], [], []
        self.feed(markup)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())
