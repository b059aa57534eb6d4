"""A report's page as a reader's program sees it: tags, numbers, pictures, what it would fetch."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

EMPTY = {"meta", "wbr", "br", "link", "img", "input", "base"}


@dataclass
class Read:
    """What is on a page.

    Attributes:
        tags: Every tag there is.
        sections: Id of a section to its text.
        rows: Id of a section to the exact numbers of every row, by its name.
        ids: Every id, in order.
        fetched: Addresses that a browser would ask for.
        links: Where links on the page lead.
    """

    tags: set[str] = field(default_factory=set)
    sections: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[tuple[str, list[float]]]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found = Read()
        self.open: list[str] = []
        self.section = ""
        self.name: str | None = None

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.found.tags.add(tag)
        self.found.ids += [given["id"]] if "id" in given else []
        assert not any(name.startswith("on") for name in given), given
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "section":
            self.section = given["id"]
            self.found.sections[self.section] = ""
            self.found.rows[self.section] = []
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            value = given.get(name, "")
            if value.startswith("#"):
                self.found.links.append(value[1:])
            elif value and tag != "data":
                self.found.fetched.append(value)
        if tag == "th" and given.get("scope") == "row":
            self.name = ""
        if tag == "data":
            self.found.rows[self.section][-1][1].append(float(given["value"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "th" and self.name is not None:
            self.found.rows[self.section].append((self.name, []))
            self.name = None

    def handle_data(self, data: str) -> None:
        if self.name is not None:
            self.name += data
        if self.section:
            self.found.sections[self.section] += data


def read_page(text: str) -> Read:
    """Parses a page; every tag has to be closed in its order."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader.found


def assert_alone(text: str) -> Read:
    """The page stands by itself: no scripts, nothing fetched, two themes, pictures that are XML."""
    found = read_page(text)
    assert not found.tags & {"script", "img", "link", "iframe", "object", "embed", "image"}
    assert found.fetched == []
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+[^\s\"<)]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}, addresses  # the name of a language
    assert not re.search(r"@import\b|\burl\((?!#)|javascript:", text)
    assert len(found.ids) == len(set(found.ids))
    assert set(found.links) <= set(found.ids)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count("--paper:") == 2  # a value for light and one for dark
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label") and root.get("viewBox")
        used = set(re.findall(r"var\(--([\w-]+)\)", picture))
        assert used <= set(re.findall(r"--([\w-]+):", text))
        assert "#0102" not in picture  # every colour that stands for another was exchanged
    return found
