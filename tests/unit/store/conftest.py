"""Each case of the store, on a folder and on a real S3 server."""

import pytest


@pytest.fixture
def store(both):
    """Every case is one of a folder and one of S3."""
    return both
