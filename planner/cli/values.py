"""What the words after a flag are taken for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast, get_args, get_origin

from cyclopts import CoercionError, convert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cyclopts import Token


_NUMBERS = {int: "a whole number", float: "a number"}


def value_of(type_: object, tokens: Sequence[Token]) -> object:
    """What cyclopts makes of a flag's words, but 3.5 is no whole number: it would round that.

    Raises:
        CoercionError: words that are not valid; numbers are called so, not by Python's types.
    """
    arms = get_args(type_) or (type_,)
    types = [*arms, *(inner for arm in arms for inner in get_args(arm))]  # Annotated ones too
    number = next((number for number in _NUMBERS if number in types), None)
    if number is None:
        return cast("object", convert(type_, tokens))
    (token,) = tokens
    try:
        value = cast("object", convert(type_, tokens))
        if not isinstance(value, int) or "." not in token.value:
            return value
    except CoercionError:
        pass
    words = [word for arm in arms if get_origin(arm) is Literal for word in get_args(arm)]
    from mhcplan.planner.plan.file import FLAG_FIELDS

    valid = f"{', '.join(words)} or {_NUMBERS[number]}" if words else _NUMBERS[number]
    is_swept = (token.keyword or "").lstrip("-").replace("-", "_") in FLAG_FIELDS
    is_many = "," in token.value or ".." in token.value
    hint = "; mhcplan sweep takes lists and ranges" if is_swept and is_many else ""
    raise CoercionError(token=token, msg=f'"{token.value}" is not {valid}{hint}')
