"""The core's values as JSON, for the store, for the plan and for recordings. Strict both ways.

Field names are those of the dataclasses, a rung is its name in small letters, and what JSON has no number for is
written "nan", "inf" or "-inf". Unknown and missing fields are errors: half a value decides wrongly.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

from autoscaling.core.types import Rung

T = TypeVar("T")
Encode = Callable[[Any], Any]
Decode = Callable[[Any, str], Any]

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class CodecError(ValueError):
    """The message names the path within the value, what is there, and what would be right."""


def to_plain(value: Any) -> Any:
    """A dataclass of the core as dicts, lists, strings and finite numbers."""
    kind: Any = type(value)
    return _coder(kind)[0](value)


def from_plain(kind: type[T], data: Any) -> T:
    """The value that `to_plain` was given. Raises CodecError."""
    wanted: Any = kind
    value: T = _coder(wanted)[1](data, kind.__name__)
    return value


def to_json(value: Any) -> str:
    """One line."""
    return json.dumps(to_plain(value), separators=(",", ":"), allow_nan=False)


def from_json(kind: type[T], text: str | bytes) -> T:
    """Raises CodecError, for text that is no JSON too."""
    return from_plain(kind, parse(text))


def parse(text: str | bytes) -> Any:
    """JSON as plain values. Raises CodecError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"not JSON: {error}") from error


@cache
def _coder(kind: Any) -> tuple[Encode, Decode]:
    simple = _SIMPLE.get(kind)
    if simple is not None:
        return simple
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _optional(args)
    if origin is tuple:
        return _tuple(args)
    if origin is collections.abc.Mapping:
        return _mapping(args)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return lambda value: value.value, _enum(kind)
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"no JSON form for {kind}")
    return _dataclass(kind)


def _dataclass(kind: Any) -> tuple[Encode, Decode]:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    coders = {field.name: _coder(hints[field.name]) for field in fields}
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    encoders = [(name, coder[0]) for name, coder in coders.items()]
    decoders = {name: coder[1] for name, coder in coders.items()}

    def encode(value: Any) -> Any:
        return {name: encoder(getattr(value, name)) for name, encoder in encoders}

    def decode(data: Any, path: str) -> Any:
        if not isinstance(data, dict):
            raise CodecError(f"{path}: {_shown(data)} is not an object")
        arguments = {}
        for name, item in data.items():
            decoder = decoders.get(name)
            if decoder is None:
                raise CodecError(f"{path}: unknown field {name!r}; there are {', '.join(sorted(decoders))}")
            arguments[name] = decoder(item, name)
        if not required <= arguments.keys():
            raise CodecError(f"{path}: {', '.join(sorted(required - arguments.keys()))} is missing")
        return kind(**arguments)

    def decode_with_path(data: Any, path: str) -> Any:
        try:
            return decode(data, path)
        except CodecError as error:
            message = str(error)
            raise CodecError(message if message.startswith(path) else f"{path}.{message}") from None

    return encode, decode_with_path


def _optional(args: tuple[Any, ...]) -> tuple[Encode, Decode]:
    (inner,) = (arg for arg in args if arg is not type(None))
    encode, decode = _coder(inner)
    return (
        lambda value: None if value is None else encode(value),
        lambda data, path: None if data is None else decode(data, path),
    )


def _tuple(args: tuple[Any, ...]) -> tuple[Encode, Decode]:
    if len(args) == 2 and args[1] is Ellipsis:
        encode, decode = _coder(args[0])
        length = None
        coders = []
    else:
        length = len(args)
        coders = [_coder(arg) for arg in args]

    def encode_all(value: Any) -> Any:
        if length is None:
            return [encode(item) for item in value]
        return [coder[0](item) for coder, item in zip(coders, value, strict=True)]

    def decode_all(data: Any, path: str) -> Any:
        if not isinstance(data, list) or (length is not None and len(data) != length):
            wanted = "a list" if length is None else f"a list of {length}"
            raise CodecError(f"{path}: {_shown(data)} is not {wanted}")
        if length is None:
            return tuple(decode(item, f"{path}[{i}]") for i, item in enumerate(data))
        return tuple(
            coder[1](item, f"{path}[{i}]") for i, (coder, item) in enumerate(zip(coders, data, strict=True))
        )

    return encode_all, decode_all


def _mapping(args: tuple[Any, ...]) -> tuple[Encode, Decode]:
    encode, decode = _coder(args[1])

    def decode_all(data: Any, path: str) -> Any:
        if not isinstance(data, dict):
            raise CodecError(f"{path}: {_shown(data)} is not an object")
        return {name: decode(item, f"{path}.{name}") for name, item in data.items()}

    return lambda value: {name: encode(item) for name, item in value.items()}, decode_all


def _exactly(kind: type) -> Decode:
    def decode(data: Any, path: str) -> Any:
        if type(data) is not kind:
            raise CodecError(
                f"{path}: {_shown(data)} is not {'true or false' if kind is bool else 'a string'}"
            )
        return data

    return decode


def _enum(kind: Any) -> Decode:
    def decode(data: Any, path: str) -> Any:
        try:
            return kind(data)
        except ValueError:
            raise CodecError(f"{path}: {_shown(data)} is none of {', '.join(kind)}") from None

    return decode


def _encode_rung(rung: Any) -> str:
    return Rung(rung).name.lower()


_RUNGS = {rung.name.lower(): rung for rung in Rung}


def _decode_rung(data: Any, path: str) -> Rung:
    rung = _RUNGS.get(data) if isinstance(data, str) else None
    if rung is None:
        raise CodecError(f"{path}: {_shown(data)} is none of {', '.join(_RUNGS)}")
    return rung


def _encode_float(value: Any) -> Any:
    if isinstance(value, int | float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _decode_float(data: Any, path: str) -> float:
    if type(data) in (int, float):
        return float(data)
    if isinstance(data, str) and data in _NOT_FINITE:
        return _NOT_FINITE[data]
    raise CodecError(f"{path}: {_shown(data)} is not a number")


def _decode_int(data: Any, path: str) -> Any:
    if type(data) is int:
        return data
    # A count that was seen as NaN is told apart from one that was not seen.
    if isinstance(data, str) and data in _NOT_FINITE:
        return _NOT_FINITE[data]
    raise CodecError(f"{path}: {_shown(data)} is not a whole number")


def _json(value: Any) -> Any:
    """What people are told may hold anything; it is kept as far as JSON can."""
    if isinstance(value, Mapping):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float):
        return _encode_float(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."


_SIMPLE: dict[Any, tuple[Encode, Decode]] = {
    Any: (_json, lambda data, _path: data),
    float: (_encode_float, _decode_float),
    int: (_encode_float, _decode_int),
    str: (lambda value: value, _exactly(str)),
    bool: (lambda value: value, _exactly(bool)),
    Rung: (_encode_rung, _decode_rung),
}


__all__ = ["CodecError", "from_json", "from_plain", "parse", "to_json", "to_plain"]
