"""Damage, by a random generator: of bytes, of JSON, of the header of a safetensors file."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any


def bytes_(data: bytes, rng: random.Random) -> bytes:
    """Bits that flip, pieces that are lost, doubled, moved or zeroed, an early end."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        size = len(damaged)
        if size == 0:
            break
        # headers stand at the beginning: half of the damage does too
        start = rng.randrange(min(size, 4096)) if rng.random() < 0.5 else rng.randrange(size)
        length = rng.choice((1, 1, 2, 4, 8, 64, 1024))
        piece = damaged[start : start + length]
        way = rng.randrange(8)
        if way == 0:
            damaged[start] ^= 1 << rng.randrange(8)
        elif way == 1:
            damaged[start] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif way == 2:
            del damaged[start : start + length]
        elif way == 3:
            damaged[start:start] = piece
        elif way == 4:
            damaged[start : start + length] = bytes(len(piece))
        elif way == 5:
            del damaged[start:]
        elif way == 6:
            damaged[start : start + len(piece)] = rng.randbytes(len(piece))
        else:
            number = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 20))
            damaged[start : start + 4] = number.to_bytes(4, rng.choice(("little", "big")))
    return bytes(damaged)


def _deep(rng: random.Random) -> Any:
    value: Any = rng.choice(([], {}, 1))
    for _ in range(rng.choice((70, 500, 20_000))):
        value = [value] if rng.random() < 0.9 else {"a": value}
    return value


def _odd(rng: random.Random) -> Any:
    """A value that some code does not expect."""
    return rng.choice(
        (
            None, True, False, 0, -1, 1, 2, 3.5, 1 << 31, 1 << 63, -(1 << 63), 10**30, 1e308,
            1e-308, float("nan"), float("inf"), 1e30, 1e-30, "", "a", "x" * 5000, "\x1b[31m",
            "\ud800", "0", [], {}, [None], [[]], {"a": 1}, [1, 2, 3], "re:(", "re:(a+)+$", "weight",
            "resnet18", "os:system", "canary:run", "canary:weight", "torchvision:resnet18",
            2_000_000, 65_536, "../../etc/passwd", "timm:torch/cifar10@data", "hf-hub:a/b",
            "local-dir:.", "F8_E4M3",
        )
    )  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Each (container, key) in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        found.append((value, key))
        if isinstance(inner, dict | list):
            _places(inner, found)
    return found


def json_(document: Any, rng: random.Random) -> Any:
    """A copy with values exchanged, lost, doubled, of another kind, or too deep."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(document, []) if isinstance(document, dict | list) else []
        if not places:
            return _odd(rng)
        container, key = rng.choice(places)
        way = rng.randrange(10)
        if way < 4:
            container[key] = _odd(rng)
        elif way == 4:
            del container[key]
        elif way == 5:
            if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            else:
                container[_name(rng)] = copy.deepcopy(container[key])
        elif way == 6:
            other, there = rng.choice(places)
            try:
                container[key] = copy.deepcopy(other[there])
            except (KeyError, IndexError):  # it has just been lost
                continue
        elif way == 7:
            container[key] = _deep(rng)
            return document  # nothing here goes that deep
        elif way == 8:
            value = container[key]
            if type(value) is int:
                container[key] = value * rng.choice((-1, 10, 1000, 10**9)) + rng.choice((0, 1, -1))
            elif isinstance(value, float):
                container[key] = value * rng.choice((-1.0, 1e10, 1e200, 1e-200))
            elif isinstance(value, str):
                container[key] = value[: len(value) // 2] + rng.choice(("", ".", "/", "\0", "é"))
            elif isinstance(value, list):
                container[key] = value * rng.choice((0, 2, 50))
        elif isinstance(container, list):
            rng.shuffle(container)
        else:
            container[_name(rng)] = container.pop(key)
    return document


def _name(rng: random.Random) -> str:
    return rng.choice(("a", "", "name", "weight", "format", "checkpoint_path", "pretrained", "\0"))


def safetensors(data: bytes, key: str | None, rng: random.Random) -> bytes:
    """Damage of the bytes, of the JSON under ``key`` of the metadata, or of the tensors' table."""
    way = rng.random()
    if way < 0.3 or (key is None and way < 0.6):
        return bytes_(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    if key is not None and way < 0.85:
        inner = json_(json.loads(header["__metadata__"][key]), rng)
        header["__metadata__"][key] = dumped(inner)
    elif way < 0.95:
        table = json_({k: v for k, v in header.items() if k != "__metadata__"}, rng)
        header = {"__metadata__": header.get("__metadata__", {}), **table}
    else:
        header = json_(header, rng)
    text = dumped(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 100_000 + "]" * 100_000
