"""Set before anything imports triton: its kernels run in the interpreter, on a machine without a GPU."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def postgresql():
    """What `bench.servers.postgresql` gives, or the reason why its tests are skipped."""
    from bench import servers

    if why_not := servers.postgresql_why_not():
        pytest.skip(why_not)
    with servers.postgresql() as both:
        yield both
