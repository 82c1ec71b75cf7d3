"""The whole product in this process, warm for all tests of this room."""

import sys

import pytest


@pytest.fixture(scope="session")
def product(tmp_path_factory):
    before = list(sys.path)
    from scripts.evaluate_demo import Product

    sys.path[:] = before
    return Product("cpu", tmp_path_factory.mktemp("product"))
