"""A docstring as the catalogue prints it: its text in markdown, its paper, and the catalogue's own
sections.

Griffe finds the sections. API reference sections (`Args:`, `Raises:`) are left out. An indented
block is code.
"""

import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from griffe import Docstring, DocstringSectionAdmonition, DocstringSectionText

_CITATION = re.compile(r'(?P<who>.* et al\. \d{4}), "(?P<title>[^"]+)"(?P<place>, .+)? \((?P<url>https://\S+)\)')


@dataclass(frozen=True)
class Section:
    """A section `Name: title`: its title, and the text below it without the indentation."""

    title: str
    text: str


@dataclass(frozen=True)
class Described:
    """The parts of a docstring."""

    summary: str
    """Its first paragraph, on one line."""
    rest: str
    """The other paragraphs, in markdown."""
    sections: Mapping[str, Section]
    """Name -> section, for the catalogue's own sections: `client-script`, `needs`, `paper`."""

    @property
    def paper(self) -> str:
        """The paper as a link, with authors, year and place; empty if none is cited.

        Raises:
            ValueError: the section doesn't have the form `Doe et al. 2020, "Title", place
                (https://...)`.
        """
        if "paper" not in self.sections:
            return ""
        text = " ".join(self.sections["paper"].text.split())
        if not (found := _CITATION.fullmatch(text)):
            raise ValueError(
                f"a section Paper holds {text!r}: write it as 'Doe et al. 2020, \"Title\", place (https://...)'"
            )
        return f'["{found["title"]}"]({found["url"]}), {found["who"]}{found["place"] or ""}'


@dataclass(frozen=True)
class Script:
    """The work of a recipe's client script, in markdown, and an example script."""

    text: str
    example: Path


def describe(docstring: str | None) -> Described:
    """Parse a docstring; None gives an empty description."""
    parts = Docstring(inspect.cleandoc(docstring or "")).parse("google")
    text = "\n\n".join(part.value for part in parts if isinstance(part, DocstringSectionText))
    summary, _, rest = text.partition("\n\n")
    sections = {
        str(part.value.kind): Section(part.title or "", part.value.contents)
        for part in parts
        if isinstance(part, DocstringSectionAdmonition)
    }
    return Described(" ".join(summary.split()), _markdown(rest, "text"), sections)


def describe_script(kind: type) -> Script:
    """The client script of a recipe, from its section `Client script: FILE`.

    Raises:
        ValueError: there is no such section.
    """
    section = describe(inspect.getdoc(kind)).sections.get("client-script")
    if section is None:
        raise ValueError(f"the docstring of {kind.__name__} has no section 'Client script: FILE'")
    return Script(_markdown(section.text, "python\n# client.py"), Path(section.title))


def _markdown(text: str, language: str) -> str:
    """Convert text to markdown; indented blocks become code."""
    blocks = []
    for block in re.split(r"\n\n+", text.strip("\n")):
        code = block.startswith("    ")
        blocks.append(f"```{language}\n{textwrap.dedent(block)}\n```" if code else " ".join(block.split()))
    return "\n\n".join(blocks)
