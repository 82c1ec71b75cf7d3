"""Python files as syntax trees, for tests that read the code."""

import ast
import gc
from functools import cache


@cache
def syntax_tree(path):
    """The tree of a file, parsed once and without a garbage collection in the middle.

    In CPython 3.11 a collection while the parser makes its objects may end in `SystemError: AST constructor recursion
    depth mismatch` (python/cpython issue 106905).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text("utf-8"))
    finally:
        if enabled:
            gc.enable()
