"""Reads a report's page with the parser of the standard library."""

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "input", "br"}


class ReportPage(HTMLParser):
    """Elements, attributes, visible text and JSON of a page; elements that are not closed are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements = []  # pairs of tag and attributes
        self.data = {}  # id of a script with JSON -> content
        self.script = self.style = self.text = ""
        self.declaration = None
        self._open = []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_decl(self, decl):
        self.declaration = decl

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.data[attributes["id"]] = json.loads(data)
        elif tag == "script":
            self.script += data
        elif tag == "style":
            self.style += data
        else:
            self.text += data

    def count(self) -> Counter:
        """Number of elements by tag."""
        return Counter(tag for tag, _ in self.elements)

    def attributes(self, tag: str) -> list:
        """Attributes of each element of a tag."""
        return [attributes for found, attributes in self.elements if found == tag]

    @property
    def report(self) -> dict:
        """What the script of the page reads when it starts."""
        return self.data["report"]

    def sentences(self) -> str:
        """The visible text with single spaces."""
        return " ".join(self.text.split())
