import sys

import pytest

from tp_attention.launch import RankError


@pytest.fixture
def failures(world, monkeypatch):
    """run(n, fn, *args) -> {rank: Failure} for a function that fails; `grace`: seconds to hear what all ranks say."""

    def run(n, fn, *args, tp=None, grace=15.0):
        monkeypatch.setattr(sys.modules["tp_attention.launch.spawn"], "GRACE", grace)
        with pytest.raises(RankError) as caught:
            world(n, tp=tp)(fn, *args)
        return {failure.rank: failure for failure in caught.value.failures}

    return run
