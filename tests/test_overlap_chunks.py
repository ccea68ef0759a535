"""How the rows of a projection of many tokens are shared out into chunks, and when these are sent."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tp_attention.comm.symmetric.overlap import CHUNKS, TILE, chunk_ends, rows_in, sendings


def tiles(rows: int, columns: int) -> int:
    return -(-rows // TILE[0]) * -(-columns // TILE[1])


@given(st.integers(1, 40_000), st.integers(1, 40_000), st.sampled_from((4, 78, 114, 132)))
def test_chunks_are_whole_waves_and_the_last_is_one(owned: int, columns: int, processors: int) -> None:
    ends = chunk_ends(owned, columns, processors)
    assert ends[0] == 0 and ends[-1] == owned and len(ends) <= CHUNKS + 1
    assert all(start < end and start % TILE[0] == 0 for start, end in itertools.pairwise(ends))
    assert ends[-1] - ends[-2] <= rows_in(1, columns, processors)
    if tiles(TILE[0], columns) <= processors:
        waves = [-(-tiles(end - start, columns) // processors) for start, end in itertools.pairwise(ends)]
        fewest = -(-tiles(owned, columns) // (processors // tiles(TILE[0], columns) * tiles(TILE[0], columns)))
        assert sum(waves) <= fewest + 1 and waves[-1] == 1


@pytest.mark.parametrize(
    ("owned", "columns", "ends"),
    [
        (4096, 8192, (0, 1536, 2560, 3584, 4096)),
        (4096, 4096, (0, 1024, 2048, 3072, 4096)),
        (4096, 5120, (0, 1664, 3328, 4096)),  # 5 waves: 26 rows of 20 tiles fit in four, not in two and twice one
        (512, 8192, (0, 512)),
        (600, 8192, (0, 512, 600)),
        (4097, 8192, (0, 1536, 3072, 4096, 4097)),
    ],
)
def test_chunks_of_132_sms(owned: int, columns: int, ends: tuple[int, ...]) -> None:
    assert chunk_ends(owned, columns, 132) == ends


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_every_chunk_is_sent_once_in_two_goes(owned: int, columns: int) -> None:
    goes = sendings(chunk_ends(owned, columns, 132))
    assert len(goes) <= 2 and all(many > 0 for _, many in goes)
    assert [first for first, _ in goes] == [0, goes[0][1]][: len(goes)]
    assert sum(many for _, many in goes) == len(chunk_ends(owned, columns, 132)) - 1


@pytest.mark.parametrize(
    ("ends", "goes"),
    [
        ((0, 512), ((0, 1),)),
        ((0, 768, 1000), ((0, 1), (1, 1))),
        ((0, 1024, 2048, 3072, 4096), ((0, 2), (2, 2))),
        ((0, 1664, 3328, 4096), ((0, 1), (1, 2))),
        ((0, 1152, 2304, 3456, 4096), ((0, 2), (2, 2))),
    ],
)
def test_the_two_goes_are_as_equal_as_can_be(ends: tuple[int, ...], goes: tuple[tuple[int, int], ...]) -> None:
    assert sendings(ends) == goes
