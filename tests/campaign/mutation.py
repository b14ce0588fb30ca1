"""Random changes of bytes, JSON values and .safetensors files: the same ones for the same random numbers."""

import json
import struct
from random import Random
from typing import Any

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    127,
    128,
    255,
    256,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
)
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "", "x")


def mutated_bytes(random: Random, data: bytes, most: int = 4) -> bytes:
    """`data` after one to `most` changes: bits, bytes, numbers, cuts, repeats, insertions."""
    for _ in range(random.randint(1, most)):
        data = random.choice(_CHANGES)(random, data)
    return data


def _flip_bit(random: Random, data: bytes) -> bytes:
    if not data:
        return data
    at = _place(random, data)
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def _set_byte(random: Random, data: bytes) -> bytes:
    if not data:
        return data
    at = _place(random, data)
    return data[:at] + bytes([random.choice((0, 1, 127, 128, 254, 255, random.randrange(256)))]) + data[at + 1 :]


def _set_number(random: Random, data: bytes) -> bytes:
    """Two, four or eight bytes become a number at which programs often break."""
    width, order = random.choice((2, 4, 4, 8)), random.choice(("little", "big"))
    at = _place(random, data) if data else 0
    number = random.choice(NUMBERS) % (1 << 8 * width)
    return data[:at] + number.to_bytes(width, order) + data[at + width :]


def _cut_end(random: Random, data: bytes) -> bytes:
    return data[: random.randint(0, len(data))]


def _cut_middle(random: Random, data: bytes) -> bytes:
    start = random.randint(0, len(data))
    return data[:start] + data[start + random.choice((1, 2, 4, 16, 100)) :]


def _repeat(random: Random, data: bytes) -> bytes:
    start, length = random.randint(0, len(data)), random.choice((1, 4, 16, 200))
    return data[: start + length] + data[start:]


def _insert(random: Random, data: bytes) -> bytes:
    at = random.randint(0, len(data))
    return data[:at] + random.randbytes(random.choice((1, 4, 30))) + data[at:]


_CHANGES = (_flip_bit, _set_byte, _set_byte, _set_number, _set_number, _cut_end, _cut_middle, _repeat, _insert)


def _place(random: Random, data: bytes) -> int:
    """A place in `data`, in every second case within the header."""
    return random.randrange(min(len(data), random.choice((100, len(data)))))


def strange_value(random: Random) -> Any:
    """A JSON value that a reader may not expect."""
    deep: Any = []
    for _ in range(random.choice((3, 50, 3000))):
        deep = [deep]
    return random.choice(
        (
            *(None, True, False, -1, 0, 1, 3, 1.5, -0.0, 1e308, 10**30, -(10**400), float("nan"), float("inf")),
            *("", "x", "x" * 3000, "../../etc/passwd", "\ud800", "图\0", "nan", "fp16", [], {}, [1], [None], {"": 0}),
            *([[1, 2], [3]], {"a": {"b": []}}, [10**9], [32, -32], [0, 0], "32", deep),
        )
    )


def mutated_json(random: Random, value: Any) -> Any:
    """`value` with one value in it replaced, removed, renamed or doubled."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        rest = {name: entry for name, entry in value.items() if name != key}
        action = random.random()
        if action < 0.15:
            return rest
        if action < 0.25:
            return {**rest, random.choice((f"{key}x", "", "block_out_channels", "timestep")): value[key]}
        return {**value, key: mutated_json(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        action = random.random()
        if action < 0.2:
            return value[:at] + value[at + 1 :]
        if action < 0.4:
            return value[:at] + value[at:][:1] * 2 + value[at + 1 :]
        return [*value[:at], mutated_json(random, value[at]), *value[at + 1 :]]
    return strange_value(random)


def json_text(value: Any) -> str:
    """`value` as JSON; one that is nested too deeply for Python's writer is written by hand."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 3000 + "]" * 3000


def mutated_safetensors(random: Random, data: bytes) -> bytes:
    """A .safetensors file with changes of its header that leave it well-formed; in every fourth case of its bytes."""
    if random.random() < 0.25:
        return mutated_bytes(random, data)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(random.randint(1, 3)):
        names = [name for name in header if name != "__metadata__"]
        if names:
            header, body = random.choice(_HEADER_CHANGES)(random, header, body, random.choice(names))
    if random.random() < 0.5:
        header["__metadata__"] = _mutated_metadata(random, header.get("__metadata__", {}))
    text = json_text(header).encode("utf-8", "surrogatepass")
    length = len(text) if random.random() < 0.97 else random.choice(NUMBERS)
    return struct.pack("<Q", length) + text + body


def _mutated_metadata(random: Random, metadata: Any) -> Any:
    """In most cases the description inside is changed; in others the entries around it."""
    if isinstance(metadata, dict) and "icmsr" in metadata and random.random() < 0.8:
        try:
            return {**metadata, "icmsr": json_text(mutated_json(random, json.loads(metadata["icmsr"])))}
        except (ValueError, TypeError):
            return metadata
    return mutated_json(random, metadata)


def _change_dtype(random: Random, header: dict, body: bytes, name: str) -> tuple[dict, bytes]:
    return {**header, name: {**header[name], "dtype": random.choice(DTYPES)}}, body


def _change_shape(random: Random, header: dict, body: bytes, name: str) -> tuple[dict, bytes]:
    """Another order of the sides, which fits the data; or sides that do not."""
    shape = header[name].get("shape")
    if isinstance(shape, list) and random.random() < 0.6:
        changed = random.choice(([*shape[::-1]], [1, *shape], [*shape, 1], shape[1:]))
    else:
        changed = random.choice(([], [0], [1], [-1, 2], [2**40], [2**62, 4], [1.5], "x", None))
    return {**header, name: {**header[name], "shape": changed}}, body


def _change_offsets(random: Random, header: dict, body: bytes, name: str) -> tuple[dict, bytes]:
    offsets = random.choice(([0, 0], [0, len(body) + 1], [8, 4], [0, 2**63], [-4, 0], [0], None, [0, len(body)]))
    return {**header, name: {**header[name], "data_offsets": offsets}}, body


def _drop(random: Random, header: dict, body: bytes, name: str) -> tuple[dict, bytes]:
    return {key: value for key, value in header.items() if key != name}, body


def _rename(random: Random, header: dict, body: bytes, name: str) -> tuple[dict, bytes]:
    prefix = random.choice(
        ("x.", "unet.", "vae.", "lora_unet_", "realistic.unet.", "model.diffusion_model.", "adapter.")
    )
    new = random.choice((f"{prefix}{name}", name.partition(".")[2] or "x", f"{name}.alpha", ""))
    return {(new if key == name else key): value for key, value in header.items()}, body


def _change_values(random: Random, header: dict, body: bytes, name: str) -> tuple[dict, bytes]:
    """Bytes of the data become 0xFF (NaN in every floating type), 0x7F or noise."""
    at, length = random.randint(0, len(body)), random.choice((1, 4, 64))
    noise = random.choice((b"\xff" * length, b"\x7f" * length, random.randbytes(length)))
    return header, body[:at] + noise[: len(body) - at] + body[at + length :]


_HEADER_CHANGES = (_change_dtype, _change_shape, _change_offsets, _drop, _rename, _change_values)
