"""What comes from a script, made fit for every log, database, terminal and JSON file.

PostgreSQL refuses a NUL in a text, and with it the state of a run whose message holds one. JSON has
no lone surrogates. A terminal obeys what it should show. All text of scripts and sites passes here
before it goes anywhere.
"""

import re

MAX_TEXT = 16_384
"""Characters of one text, such as the cause of a failure: a traceback has room, a state of
Prefect's stays small.
"""

_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LEFT_OUT = "\n... {} characters left out ...\n"


def storable(text: str, limit: int = MAX_TEXT) -> str:
    r"""The text, its control characters escaped as Python writes them (`\x00`), and no longer than
    limit; lines and tabs stay.

    Of a longer one the beginning and, because that is where a traceback says what went wrong, more
    of the end are kept. Harmless when repeated.
    """
    text = _UNFIT.sub(lambda found: repr(found[0])[1:-1], text)
    if len(text) <= limit:
        return text
    kept = limit - len(_LEFT_OUT.format(len(text)))
    if kept <= 0:
        return text[:limit]
    head = kept // 4
    return text[:head] + _LEFT_OUT.format(len(text) - kept) + text[head + len(text) - kept :]
