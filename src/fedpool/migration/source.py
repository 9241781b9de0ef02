"""The text of a Python file, with edits at the positions that `ast` reports."""

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedpool.errors import MigrationError

_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|$)")

Span = tuple[int, int]
"""Start and end, in bytes of the text as UTF-8."""


@dataclass(frozen=True)
class Source:
    """A file's text.

    Attributes:
        text: the text, with its own line endings.
        encoding: the file's encoding, from its byte order mark or its coding comment.
        name: the file's name, for messages.
    """

    text: str
    encoding: str = "utf-8"
    name: str = "<script>"

    @classmethod
    def read(cls, path: Path) -> "Source":
        """The source of a file.

        Raises:
            MigrationError: it can't be read, or isn't text in its declared encoding.
        """
        try:
            data = path.read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            return cls(data.decode(encoding), encoding, str(path))
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise MigrationError(f"{path} cannot be read as a Python file: {error}") from None

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source.

        Raises:
            MigrationError: it isn't Python.
        """
        try:
            return ast.parse(self.text)
        except (SyntaxError, ValueError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            raise MigrationError(f"{self.name}{line} is not Python, so it was left as it is: {error}") from None

    @cached_property
    def data(self) -> bytes:
        """The text as UTF-8, in which `ast` counts columns."""
        return self.text.encode()

    @cached_property
    def _starts(self) -> list[int]:
        return [match.start() for match in _LINE.finditer(self.data)]

    def offset(self, line: int, column: int) -> int:
        """The offset of a position that `ast` reports."""
        return self._starts[line - 1] + column

    def span(self, node: ast.stmt | ast.expr | ast.alias) -> Span:
        """The span of a node."""
        assert node.end_lineno is not None and node.end_col_offset is not None, "parsed nodes have ends"
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def line(self, number: int) -> str:
        """A line, without its ending."""
        start = self._starts[number - 1]
        match = _LINE.match(self.data, start)
        assert match is not None
        return match.group().decode().rstrip("\r\n")

    def around(self, span: Span) -> tuple[str, str]:
        """The text before and after a span on the same lines."""
        before = self.data[: span[0]].rpartition(b"\n")[2].rpartition(b"\r")[2]
        match = _LINE.match(self.data, span[1])
        assert match is not None
        return before.decode(), match.group().decode().rstrip("\r\n")

    @property
    def newline(self) -> str:
        """The ending of the first line."""
        match = re.search(r"\r\n|\r|\n", self.text)
        return match.group() if match else "\n"

    def edited(self, edits: list[tuple[Span, str]]) -> "Source":
        """The source with spans replaced. The spans must not overlap."""
        data = self.data
        for (start, end), text in sorted(edits, reverse=True):
            data = data[:start] + text.encode() + data[end:]
        return Source(data.decode(), self.encoding, self.name)
