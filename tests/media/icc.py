"""ICC profiles of displays and cameras, built from their primaries, for pictures in the tests."""

import struct

# Primaries adapted to D50 (Bradford), each X Y Z, and the exponent of the tone curve.
# Adobe RGB (1998) and ROMM RGB: their specifications; Display P3: SMPTE EG 432-1's primaries, here with a plain 2.2.
SPACES = {
    "Adobe RGB": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.19921875),
    "ProPhoto RGB": ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491), 1.8),
    "Display P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), 2.2),
}
D50 = (0.9642, 1.0, 0.8249)


def s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(name: str) -> bytes:
    """An ICC 2.1 matrix profile (ICC.1:2001-04, 6.3.2.2)."""
    *primaries, gamma = SPACES[name]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    title = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(title)) + title + bytes(79),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + s15(*D50),
    }
    for letter, primary in zip(b"rgb", primaries, strict=True):
        tags[bytes((letter,)) + b"XYZ"] = b"XYZ \0\0\0\0" + s15(*primary)  # type: ignore[misc]
        tags[bytes((letter,)) + b"TRC"] = curve
    table, bodies, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, body in tags.items():
        body += bytes(-len(body) % 4)
        table += tag + struct.pack(">II", at + len(bodies), len(body))
        bodies += body
    size = 128 + len(table) + len(bodies)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + s15(*D50).ljust(60, b"\0") + table + bodies
