"""The messages of a client script to its host. A script is user code, so they are checked."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from fedpool.client.link import Link

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Hello(TypedDict):
    kind: Literal["hello"]
    protocol: int


class _Word(TypedDict):
    kind: Literal["next", "bye"]


class _Scalar(TypedDict):
    key: str
    value: float
    where: dict[str, str]
    time: Finite


class _Log(_Scalar):
    kind: Literal["log"]


class _Logs(TypedDict):
    kind: Literal["logs"]
    scalars: list[_Scalar]


class _Update(TypedDict):
    kind: Literal["update"]
    round: int
    metrics: dict[str, float]
    meta: dict[str, str | int | Finite | bool | None]
    params_type: Literal["FULL", "DIFF"] | None


_MESSAGES: TypeAdapter[Any] = TypeAdapter(
    Annotated[_Hello | _Word | _Log | _Logs | _Update, Field(discriminator="kind")]
)


def next_message(link: Link) -> dict[str, Any]:
    """The script's next message.

    Raises:
        ValueError: it is not one that a script sends; the text says why.
        EOFError, OSError: the script has closed the link.
    """
    try:
        message: dict[str, Any] = _MESSAGES.validate_python(link.get())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:500]) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return message
