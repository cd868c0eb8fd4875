"""Reading the pages that the tests look at: a strict parser of what our pages may hold."""

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input"}


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.elements, self.words, self._open = [], [], []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {tag}"
        self.elements.append((tag, {key: value or "" for key, value in attributes}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)


def parsed(page: str) -> _Reader:
    """The page, read; elements have to be closed in order."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert not reader._open, f"never closed: {reader._open}"
    return reader


def elements(page: str) -> list[tuple[str, dict[str, str]]]:
    """Every element with its attributes, in order."""
    return parsed(page).elements


def text_of(part: str) -> str:
    """The words of a page or of a part of it, separated by single spaces."""
    reader = _Reader()
    reader.feed(part)
    return " ".join(" ".join(reader.words).split())
