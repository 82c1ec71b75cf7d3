"""Interpreter of the pickles that torch writes: builds descriptions of tensors, calls nothing, and always ends soon.

A pickle may name any function to call. Of the names, this one knows OrderedDict, torch's rebuild functions, its storage
types, its dtypes and shapes, and bytes, which are dropped; any other is refused before it is looked up. Of the opcodes
(https://github.com/python/cpython/blob/main/Lib/pickletools.py) it knows those of plain data. Work is bounded by the
bytes of the pickle and by MAX_STEPS; nothing is hashed but text and numbers, nothing is copied as a whole but what is
on the stack, so that structures of shared parts cost what they take in the file.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from turbodiff.weights.limits import MAX_COUNT, is_shape

MAX_STEPS = 1 << 20  # 14B with INT8 scales, written three times over, takes 0.3 million
MAX_TEXT = 1 << 16  # bytes of one string

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


class UnsafePickleError(ValueError):
    """The pickle names something that is no tensor."""


class Dtype(NamedTuple):
    """A storage type or a dtype that the pickle named."""

    name: str


class Storage(NamedTuple):
    """A storage that the pickle named: `numel` elements of `dtype` in the member `key`."""

    dtype: str
    key: str
    numel: int


class View(NamedTuple):
    """A tensor that the pickle built: a strided view of a storage, offset and stride in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_v2(*given: object) -> View:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks, ...)."""
    storage = given[0]
    return _rebuild_v3(*given[:4], False, None, Dtype(storage.dtype if isinstance(storage, Storage) else ""))


def _rebuild_v3(*given: object) -> View:
    """torch._utils._rebuild_tensor_v3(storage, offset, shape, stride, requires_grad, hooks, dtype, ...)."""
    storage, offset, shape, stride, _grad, _hooks, dtype = given[:7]
    if isinstance(storage, Storage) and isinstance(dtype, Dtype) and _is_count(offset):
        shapes = [tuple(axes) for axes in (shape, stride) if isinstance(axes, tuple | list) and is_shape(axes)]
        if len(shapes) == 2 and len(shapes[0]) == len(shapes[1]):
            return View(storage, dtype.name, offset, *shapes)  # type: ignore[arg-type]  # _is_count says so
    raise ValueError("a tensor of impossible shape")


def _rebuild_parameter(*given: object) -> object:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks)."""
    return given[0]


def _ordered_dict(*given: object) -> dict[object, object]:
    """collections.OrderedDict(); its items follow as items of a dict."""
    if given:
        raise ValueError("a dict with arguments")
    return {}


def _shape(*given: object) -> object:
    """torch.Size(axes), as DeepSpeed keeps the shapes of its parameters."""
    return given[0] if given else ()


def _dropped(*_given: object) -> object:
    """io.BytesIO(), and the bytes in it: the state of Transformer Engine's modules (`_extra_state`)."""
    return None


Call = Callable[..., object]

# Everything that a pickle may name, and what it stands for
ALLOWED: Mapping[tuple[str, str], Dtype | Call] = {
    **{(module, name): Dtype(dtype) for module in ("torch", "torch.storage") for name, dtype in STORAGES.items()},
    **{("torch", name): Dtype(dtype) for name, dtype in DTYPES.items()},
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _shape,
    ("_io", "BytesIO"): _dropped,
    ("_codecs", "encode"): _dropped,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def read_pickle(data: bytes) -> object:
    """What the pickle holds: dicts, lists, text, numbers, and a View for each tensor.

    Raises:
        UnsafePickleError: it names anything else, or uses an opcode of objects.
        ValueError, IndexError, struct.error: damaged, or larger than any real one.
    """
    return _Interpreter(data).run()


class _Interpreter:
    """The stack machine: opcodes read their arguments at `at` and change `stack` and `memo`."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(MAX_STEPS):
            op = self.data[self.at : self.at + 1]
            self.at += 1
            if op == b".":
                return self.stack[-1]
            step = self.STEPS.get(op)
            if step is None:
                raise UnsafePickleError(f"opcode {op!r}") if op else ValueError("the pickle is cut short")
            step(self)
        raise ValueError(f"more than {MAX_STEPS} steps")

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        if len(part) != count or count > MAX_TEXT:
            raise ValueError("the pickle is cut short or holds an endless text")
        self.at += count
        return part

    def number(self, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + MAX_TEXT)
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[object]:
        start = self.marks.pop()
        if start > len(self.stack):
            raise ValueError("a mark above the stack")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def find(self, module: object, name: object) -> None:
        known = ALLOWED.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            raise UnsafePickleError(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "name")
        self.push(known)

    def call(self) -> None:
        given, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or not isinstance(given, tuple):
            raise UnsafePickleError("a call of something else")
        self.push(function(*given[:16]))

    def storage(self) -> None:
        pid = self.stack.pop()
        if isinstance(pid, tuple) and len(pid) == 5:
            kind, dtype, key, _device, numel = pid
            if kind == "storage" and isinstance(dtype, Dtype) and isinstance(key, str) and _is_count(numel):
                self.push(Storage(dtype.name, key, numel))
                return
        raise UnsafePickleError("storage")

    def set_items(self, items: Sequence[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items of something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ValueError("a key that is neither text nor a number")
            target[key] = value

    def make_dict(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def extend(self, values: Sequence[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("an append to something else than a list")
        target.extend(values)

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) != count:
            raise IndexError("the stack is empty")
        del self.stack[len(self.stack) - count :]
        self.push(values)

    def integer(self, text: str) -> None:
        plain = {"00": False, "01": True}.get(text)
        if plain is None and len(text) > 24:
            raise ValueError("an endless number")
        self.push(int(text) if plain is None else plain)

    def long(self, count: int) -> None:
        if count > 16:
            raise ValueError("an endless number")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    STEPS: ClassVar[Mapping[bytes, Callable[["_Interpreter"], object]]] = {
        b"\x80": lambda s: s.take(1),
        b"\x95": lambda s: s.take(8),
        b"(": lambda s: s.marks.append(len(s.stack)),
        b"N": lambda s: s.push(None),
        b"\x88": lambda s: s.push(True),
        b"\x89": lambda s: s.push(False),
        b"]": lambda s: s.push([]),
        b"}": lambda s: s.push({}),
        b")": lambda s: s.push(()),
        b"K": lambda s: s.push(s.number("B")),
        b"M": lambda s: s.push(s.number("H")),
        b"J": lambda s: s.push(s.number("i")),
        b"G": lambda s: s.push(struct.unpack(">d", s.take(8))[0]),
        b"I": lambda s: s.integer(s.line()),
        b"L": lambda s: s.integer(s.line().removesuffix("L")),
        b"\x8a": lambda s: s.long(s.number("B")),
        b"X": lambda s: s.push(s.take(s.number("I")).decode("utf-8", "surrogatepass")),
        b"\x8c": lambda s: s.push(s.take(s.number("B")).decode("utf-8", "surrogatepass")),
        b"\x8d": lambda s: s.push(s.take(s.number("Q")).decode("utf-8", "surrogatepass")),
        b"U": lambda s: s.push(s.take(s.number("B")).decode("latin-1")),
        b"T": lambda s: s.push(s.take(s.number("I")).decode("latin-1")),
        b"C": lambda s: s.push(s.take(s.number("B"))),
        b"B": lambda s: s.push(s.take(s.number("I"))),
        b"V": lambda s: s.push(s.line()),
        b"S": lambda s: s.push(s.line().strip("'\"")),
        b"c": lambda s: s.find(s.line(), s.line()),
        b"\x93": lambda s: s.find(*[s.stack.pop(), s.stack.pop()][::-1]),
        b"R": lambda s: s.call(),
        b"\x81": lambda s: s.call(),
        b"Q": lambda s: s.storage(),
        b"b": lambda s: s.stack.pop(),  # attributes, as a state dict's version numbers: nothing here has any
        b"0": lambda s: s.stack.pop(),
        b"t": lambda s: s.push(tuple(s.since_mark())),
        b"l": lambda s: s.push(s.since_mark()),
        b"d": lambda s: s.make_dict(),
        b"\x85": lambda s: s.tuple_of(1),
        b"\x86": lambda s: s.tuple_of(2),
        b"\x87": lambda s: s.tuple_of(3),
        b"s": lambda s: s.set_items([s.stack.pop(), s.stack.pop()][::-1]),
        b"u": lambda s: s.set_items(s.since_mark()),
        b"a": lambda s: s.extend([s.stack.pop()]),
        b"e": lambda s: s.extend(s.since_mark()),
        b"q": lambda s: s.memo.update({s.number("B"): s.stack[-1]}),
        b"r": lambda s: s.memo.update({s.number("I"): s.stack[-1]}),
        b"p": lambda s: s.memo.update({int(s.line()[:12]): s.stack[-1]}),
        b"\x94": lambda s: s.memo.update({len(s.memo): s.stack[-1]}),
        b"h": lambda s: s.push(s.memo[s.number("B")]),
        b"j": lambda s: s.push(s.memo[s.number("I")]),
        b"g": lambda s: s.push(s.memo[int(s.line()[:12])]),
    }


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < MAX_COUNT
