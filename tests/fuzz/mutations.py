"""Seeded damage to bytes, JSON values and protobuf messages."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    -7,
    100,
    255,
    65_536,
    10**6,
    2**31 - 1,
    2**31,
    -(2**31),
    2**40,
    2**63 - 1,
    -(2**63),
)
TEXTS = (
    "",
    " ",
    "\x00",
    "a" * 3000,
    "../secret",
    "/etc/passwd",
    "é\u202e\U0001f600",
    "a\nb",
    "%s%n",
    "[bold]",
    "image",
    "logits",
)
FLOATS = (0.0, -0.0, 1e30, -1e30, 1e-42, 3.4e38, float("inf"), float("-inf"), float("nan"))


def choice(rng: np.random.Generator, items: Any) -> Any:
    """One of several items, whatever they are."""
    items = list(items)
    return items[int(rng.integers(len(items)))]


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut bytes short, flip bits, repeat, drop or overwrite a part."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        if not data:
            break
        at = int(rng.integers(len(data)))
        length = int(min(2 ** rng.integers(0, 10), len(data) - at))
        match int(rng.integers(6)):
            case 0:
                del data[at:]
            case 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                data[at : at + length] = data[at : at + length] * 2
            case 3:
                del data[at : at + length]
            case 4:
                data[at : at + length] = rng.bytes(length)
            case 5:
                data[at] = int(choice(rng, (0, 1, 127, 128, 255)))
    return bytes(data)


def changed_json(rng: np.random.Generator, value: Any) -> Any:
    """A JSON value with one of its parts replaced, dropped, repeated or added."""
    value = copy.deepcopy(value)
    parts = list(_parts(value))
    if not parts:
        return _odd(rng, value)
    container, key = choice(rng, parts)
    match int(rng.integers(5)):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        case 2 if isinstance(container, dict):
            container[str(choice(rng, (*TEXTS, "version", "__class__")))] = container[key]
        case 3:
            container[key] = copy.deepcopy(choice(rng, [other[k] for other, k in parts]))
        case _:
            container[key] = _odd(rng, container[key])
    return value


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key
        yield from _parts(part)


def _odd(rng: np.random.Generator, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return choice(rng, (*INTEGERS, value + 1, value - 1, 2 * value, float(value), str(value)))
    odd = (None, True, False, [], {}, [[]], [None], {"a": 1}, 10**400, *INTEGERS, *FLOATS, *TEXTS)
    return choice(rng, odd)


def change(rng: np.random.Generator, message: Message) -> None:
    """Change one field, anywhere in a protobuf message."""
    parent, field = choice(rng, _fields(message))
    values = getattr(parent, field.name)
    if field.is_repeated:
        _change_repeated(rng, message, parent, field, values)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        others = _messages(message, field.message_type.full_name)
        if rng.random() < 0.5 or not others:
            parent.ClearField(field.name)
        else:
            other = copy.deepcopy(choice(rng, others))
            values.CopyFrom(other)
    elif rng.random() < 0.2:
        parent.ClearField(field.name)
    else:
        setattr(parent, field.name, _scalar(rng, message, field, values))


def _change_repeated(
    rng: np.random.Generator, root: Message, parent: Message, field: FieldDescriptor, values: Any
) -> None:
    at = int(rng.integers(len(values)))
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    match int(rng.integers(6)):
        case 0:
            del values[at]
        case 1:
            if is_message:
                values.add().CopyFrom(copy.deepcopy(values[at]))
            else:
                values.append(values[at])
        case 2:
            del values[:]
        case 3:  # in another order
            items = [copy.deepcopy(item) for item in values]
            order = rng.permutation(len(items))
            del values[:]
            values.extend(items[i] for i in order)
        case _:
            if is_message:
                others = _messages(root, field.message_type.full_name)
                values[at].CopyFrom(copy.deepcopy(choice(rng, others)))
            else:
                values[at] = _scalar(rng, root, field, values[at])


def _scalar(rng: np.random.Generator, root: Message, field: FieldDescriptor, value: Any) -> Any:
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        if field.type == FieldDescriptor.TYPE_BYTES:
            if len(value) >= 4 and rng.random() < 0.5:
                numbers = bytearray(value)
                at = 4 * int(rng.integers(len(value) // 4))
                numbers[at : at + 4] = np.float32(choice(rng, FLOATS)).tobytes()
                return bytes(numbers)
            return damaged(rng, value)
        names = sorted(_texts(root))
        return choice(rng, names if names and rng.random() < 0.7 else TEXTS)
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return choice(rng, FLOATS)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return int(choice(rng, field.enum_type.values).number)
    if rng.random() < 0.5:
        return int(np.clip(value + int(rng.integers(-3, 4)), -(2**31), 2**31 - 1))
    small = field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_UINT32)
    if field.type in (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_UINT32):
        return abs(int(choice(rng, INTEGERS))) % 2**31
    return int(choice(rng, [i for i in INTEGERS if not small or -(2**31) <= i < 2**31]))


def _fields(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Every field that is set, with the message that it is of."""
    for field, value in message.ListFields():
        yield message, field
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                yield from _fields(inner)


def _messages(message: Message, kind: str) -> list[Message]:
    found = [message] if message.DESCRIPTOR.full_name == kind else []
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                found += _messages(inner, kind)
    return found


def _texts(message: Message) -> set[str]:
    found: set[str] = set()
    for parent, field in _fields(message):
        if field.type == FieldDescriptor.TYPE_STRING:
            value = getattr(parent, field.name)
            found.update(value if field.is_repeated else [value])
    return found
