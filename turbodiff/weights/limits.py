"""How much of a checkpoint's header is read at most: several times what any real model has. No file is a bomb."""

from collections.abc import Sequence

MAX_HEADER_BYTES = 16 << 20  # 14B with INT8 scales takes 0.2 MB, a LoRA with its training log in the metadata a few
MAX_MARKS = 1 << 19  # brackets and commas of a header: 13 a tensor, and what a training log has
MAX_TENSORS = 1 << 14  # 14B with INT8 scales has 1,575
MAX_AXES = 8
MAX_COUNT = 1 << 48  # values along an axis, bytes in a file


def is_shape(numbers: Sequence[object]) -> bool:
    """Whether these can be the axes of a tensor: few, whole and none beyond any disk."""
    return len(numbers) <= MAX_AXES and all(type(number) is int and 0 <= number < MAX_COUNT for number in numbers)
