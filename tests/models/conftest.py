"""Small programs, many of them: compile time is what counts."""

import pytest

from tests import tiny


@pytest.fixture(scope="package", autouse=True)
def quick():
    with tiny.quick_compile():
        yield
