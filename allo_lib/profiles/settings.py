"""Kinds of values of settings, and the one place that checks settings (by pydantic)."""

import dataclasses
import re
import typing
from typing import Annotated

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from allo_lib.errors import AlloError, short

LARGEST = 2**31 - 1  # of any count
STRICT = ConfigDict(extra="forbid")


def _no_boolean(value):
    if isinstance(value, bool):
        raise ValueError(f"got {value}, expected a number")
    return value


def _whole_text(value: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"half of a surrogate pair in {short(value)}; expected text")
    return value


def _list(value):
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"got {short(value)}, expected a list")
    return value


def _each_once(words: tuple) -> tuple:
    twice = [word for word in dict.fromkeys(words) if words.count(word) > 1]
    if twice:
        raise ValueError(f"{short(twice[0])} is named twice; name each once")
    return words


def _folder_name(value: str) -> str:
    # Domains and data sets become names of folders and of rows of tables.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(f"{short(value)} cannot name a folder; use letters, digits, . _ -")
    return value


Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
# YAML 1.1 reads 1e-4 (no dot) as text, so a text of a number is a number.
Finite = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Number = Annotated[Finite, Field(ge=0)]
Rate = Annotated[Finite, Field(gt=0)]
Share = Annotated[Finite, Field(gt=0, le=1)]
Fraction = Annotated[Finite, Field(ge=0, le=1)]
BelowOne = Annotated[Finite, Field(ge=0, lt=1)]
Text = Annotated[str, Field(strict=True), AfterValidator(_whole_text)]
Name = Annotated[Text, AfterValidator(_folder_name)]
Flag = Annotated[bool, Field(strict=True)]
AsList, Once = BeforeValidator(_list), AfterValidator(_each_once)
Texts = Annotated[tuple[Text, ...], AsList]
Words = Annotated[Texts, Once]
Names = Annotated[tuple[Name, ...], AsList, Once]
Numbers = Annotated[tuple[Number, ...], AsList]


def checked(kind: type, given, where: str):
    """Settings of the dataclass `kind` from plain values, every one of them checked.

    Raises:
        AlloError: one line for the first value that is unknown, of a wrong type or out of range:
            `where` and its key, what was given, what was expected.
    """
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        told = error.errors(include_url=False, include_context=False)[0]
    place, expected = [part for part in told["loc"] if part != "[key]"], told["msg"]
    if told["type"] in ("unexpected_keyword_argument", "invalid_key"):
        expected = f"unknown key {short(place.pop())}; expected one of {_keys(kind, place)}"
    elif told["type"] == "value_error":
        expected = expected.removeprefix("Value error, ")
    else:
        section = told["type"] in ("dataclass_type", "dict_type")
        wanted = "a section with keys" if section else expected.removeprefix("Input should be ")
        expected = f"got {short(told['input'])}, expected {wanted}"
    key = ".".join(map(str, place))
    raise AlloError(": ".join(part for part in (where, key, expected) if part))


def _keys(kind: type, place: list) -> str:
    """Keys of the section of `kind` at a place in it."""
    for step in place:
        is_dict = typing.get_origin(kind) is dict  # of named sections
        kind = typing.get_args(kind)[1] if is_dict else typing.get_type_hints(kind)[step]
    return ", ".join(sorted(one.name for one in dataclasses.fields(kind)))
