"""Make text from scripts fit for every log, database, terminal and JSON file.

PostgreSQL refuses a NUL in a text, and so a run's state whose message contains one. JSON has no
lone surrogates. A terminal obeys control characters. All text from scripts and sites passes through
here before it goes anywhere.
"""

import re

MAX_TEXT = 16_384
"""Character limit of a text, such as a failure's cause: enough for a traceback."""

_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LEFT_OUT = "\n... {} characters left out ...\n"


def storable(text: str, limit: int = MAX_TEXT) -> str:
    r"""The text, cut to limit, with control characters other than lines and tabs escaped (`\x00`).

    A longer text keeps its beginning and, because a traceback ends with the error, more of its end.
    Idempotent.
    """
    text = _UNFIT.sub(lambda found: repr(found[0])[1:-1], text)
    if len(text) <= limit:
        return text
    kept = limit - len(_LEFT_OUT.format(len(text)))
    if kept <= 0:
        return text[:limit]
    head = kept // 4
    return text[:head] + _LEFT_OUT.format(len(text) - kept) + text[head + len(text) - kept :]
