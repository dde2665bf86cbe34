"""Damage: to JSON values, to bytes, to safetensors headers, to whole folders; all from one seed."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SENTINEL = "run-by-a-pickle"
"""What a pickle of ``trap`` would make beside the folder that it lies in, were it ever loaded."""


def trap(where: Path) -> bytes:
    """A pickle that makes the folder ``where / SENTINEL`` when it is loaded."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(where / SENTINEL),)

    return pickle.dumps(Payload())


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 4097, 10**6, -(10**6), 2**31, 2**63, -(2**63),
    2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308,
    float("inf"), float("-inf"), float("nan"),
    "", " ", "x", "x" * 5000, "a\nb", "\x00", "\x1b[31m", "ä€😀", "\ud800", "../x",
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "~/x", "..", ".", "NaN", "1", "true",
    "file:///etc/passwd",
    "https://example.com/x", "local-dir:/etc", "hf-hub:a/b", "__class__", "forward", "__init__",
    [], {}, [None], [[]], {"": 0}, {"x": {}}, _deep(40), list(range(50)), ["../x"], [True], [1.5],
)  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _places(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:20]):
            found += _places(inner, (*at, index))
    return found


def damaged_value(value: Any, chance: random.Random) -> Any:
    """JSON values with one thing changed: a value, a key, a type, an item more or less."""
    value = json.loads(json.dumps(value))
    place = chance.choice(_places(value)[1:] or [()])
    strange = chance.choice(STRANGE)
    if not place:
        return strange
    holder = value
    for step in place[:-1]:
        holder = holder[step]
    key, old = place[-1], holder[place[-1]]
    match chance.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(("extra", "", key + "s", "__proto__", "auto_map"))] = strange
        case 2 if isinstance(holder, dict):
            holder[chance.choice(("x", key.upper(), key + " "))] = holder.pop(key)
        case 3:
            holder[key] = {str(key): old} if chance.random() < 0.5 else [old]
        case 4 if isinstance(old, int | float):
            real = float(old) if abs(old) < 1e308 else old  # 10⁴⁰⁰ has no float
            holder[key] = chance.choice((-old, old + 1, old - 1, old * 1000, real, str(old)))
        case 5 if isinstance(holder, list):
            holder.insert(key, strange if chance.random() < 0.5 else old)
        case _:
            holder[key] = strange
    return value


def damaged_text(text: str, chance: random.Random) -> bytes:
    """JSON text: usually well-formed with other values, sometimes broken as text."""
    if chance.random() < 0.15:
        return damaged_bytes(text.encode(), chance)
    value = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = damaged_value(value, chance) if isinstance(value, dict | list) else value
    out = json.dumps(value)
    match chance.randrange(12):
        case 0:
            out = out.replace("{", '{"twice": 1, "twice": 2, ', 1)
        case 1:
            out = out.replace("1", "1" + "0" * 5000, 1)
        case 2:
            out = out.replace(": 1", ": 1e999", 1)
        case 3:
            out = out.replace(": ", ": " + "[" * 100_000, 1)
    return out.encode()


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes cut short, changed, moved, doubled or replaced."""
    size = len(content)
    at = chance.randrange(size + 1)
    data = bytearray(content)
    match chance.randrange(8):
        case 0:
            del data[at:]
        case 1:
            for _ in range(chance.choice((1, 1, 3, 50)) if size else 0):
                data[chance.randrange(size)] ^= 1 << chance.randrange(8)
        case 2:
            data[at:at] = chance.randbytes(chance.choice((1, 8, 300)))
        case 3:
            del data[at : at + chance.choice((1, 8, 300))]
        case 4:
            data[at : at + 300] = bytes(len(data[at : at + 300]))
        case 5:
            data += data[at:]
        case 6:
            data = bytearray(chance.randbytes(chance.choice((0, 1, 7, 8, 9, 2000))))
        case 7:
            data[:0] = b"\xef\xbb\xbf" if chance.random() < 0.5 else b"\xff\xfe"
    return bytes(data)


def damaged_safetensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, another length of it, or other bytes."""
    if chance.random() < 0.3:
        return damaged_bytes(content, chance)
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if chance.random() < 0.15:
        claimed = chance.choice((0, 1, length - 1, length + 1, 10**8, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", claimed) + header + data
    header = damaged_text(header.decode(), chance)
    if chance.random() < 0.5:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def damaged_file(name: str, content: bytes, chance: random.Random) -> bytes:
    """One file in the way that hurts its kind."""
    if name.endswith(".json"):
        return damaged_text(content.decode(), chance)
    if name.endswith(".safetensors"):
        return damaged_safetensors(content, chance)
    return damaged_bytes(content, chance)


def damaged_folder(target: Path, files: Mapping[str, bytes], chance: random.Random) -> str:
    """Write ``files`` to ``target`` with something wrong, and say what."""
    target.mkdir()
    outside = target.parent / "outside"
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    done = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        name = chance.choice(sorted(files))
        path = target / name
        kind = "content" if chance.random() < 0.85 else chance.choice(sorted(ODD_FILES))
        done.append(f"{kind} of {name}")
        if kind == "content":
            content = damaged_file(name, files[name], chance)
            path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
            ODD_FILES[kind](path, files[name], outside)
    return ", ".join(done)


def _link(path: Path, content: bytes, outside: Path) -> None:
    outside.mkdir(exist_ok=True)
    (outside / path.name).write_bytes(content)
    path.symlink_to(outside / path.name)


ODD_FILES: dict[str, Callable[[Path, bytes, Path], None]] = {
    "absence": lambda path, content, outside: None,
    "emptiness": lambda path, content, outside: path.write_bytes(b"") and None,
    "pickle": lambda path, content, outside: path.write_bytes(trap(path.parent)) and None,
    "link out": _link,
    "link to nowhere": lambda path, content, outside: path.symlink_to(path.parent / "nowhere"),
    "link to itself": lambda path, content, outside: path.symlink_to(path),
    "link to a device": lambda path, content, outside: path.symlink_to("/dev/zero"),
    "folder": lambda path, content, outside: path.mkdir(),
    "pipe": lambda path, content, outside: os.mkfifo(path),
}
