import pytest
import torch

from sparse_lth import bsr
from sparse_lth.kernels import Pattern
from sparse_lth.kernels.linear_torch import to_dense


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (32, 48), (33, 50)])
@pytest.mark.parametrize("blocksize", [(1, 1), (3, 2), (16, 16), (64, 64)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_there_and_back_keeps_what_is_kept_and_only_that(shape, blocksize, density):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < density
    values, crow, col = bsr.from_dense(weight, mask, blocksize)
    bsr.validate(values, crow, col, shape)
    pattern = Pattern.from_indices(crow, col, bsr.grid_shape(shape, blocksize))
    assert torch.equal(to_dense(values, *pattern[:2], shape), torch.where(mask, weight, 0))
    kept_blocks = bsr.blocks_of(mask, blocksize).any((2, 3))
    assert len(values) == int(kept_blocks.sum())


def test_pattern_transposes_and_orders_by_work():
    keep = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    _, crow, col = bsr.from_dense(keep.float(), keep, (1, 1))
    pattern = Pattern.from_indices(crow, col, (3, 3))
    assert crow.tolist() == [0, 2, 2, 5]
    assert col.tolist() == [0, 2, 0, 1, 2]
    assert pattern.row_indices.tolist() == [0, 0, 2, 2, 2]
    assert pattern.row_order.tolist() == [2, 0, 1]
    assert pattern.ccol_indices.tolist() == [0, 2, 3, 5]
    assert pattern.t_row_indices.tolist() == [0, 2, 2, 0, 2]
    assert pattern.t_slots.tolist() == [0, 2, 3, 1, 4]
    assert pattern.col_order.tolist() == [0, 2, 1]
    assert all(t.dtype == torch.int32 for t in pattern[:-1])  # not `programs`


@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        ([0, 1], [0, 1], "expected 3 crow_indices for 2 block rows, got 2"),
        ([0, 1, 2], [0], "expected 2 col_indices for 2 blocks, got 1"),
        ([1, 1, 2], [0, 1], "crow_indices to rise from 0 to 2, got"),
        ([0, 3, 2], [0, 1], "crow_indices to rise from 0 to 2, got"),
        ([0, 1, 1], [0, 1], "crow_indices to rise from 0 to 2, got"),
        ([0, 1, 2], [0, 3], "col_indices from 0 to 2, got 0 to 3"),
        ([0, 1, 2], [-1, 1], "col_indices from 0 to 2, got -1 to 1"),
        ([0, 2, 2], [1, 1], "rise strictly within a block row, got 1 then 1 at 1"),
        ([0, 2, 2], [2, 0], "rise strictly within a block row, got 2 then 0 at 1"),
    ],
)
def test_bad_indices_are_refused_before_a_kernel_sees_them(crow, col, message):
    indices = (torch.tensor(i, dtype=torch.int32) for i in (crow, col))
    with pytest.raises(ValueError, match=message):
        bsr.validate(torch.zeros(2, 4, 4), *indices, (8, 12))


def test_columns_may_fall_from_one_row_to_the_next_over_empty_rows():
    crow, col = (torch.tensor(i, dtype=torch.int32) for i in ([0, 1, 1, 3], [2, 0, 1]))
    bsr.validate(torch.zeros(3, 4, 4), crow, col, (12, 12))


def test_bad_dtypes_are_refused():
    good = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"vector of int32, got torch\.int64"):
        bsr.validate(torch.zeros(0, 4, 4), good.long(), good[:0], (4, 4))
    with pytest.raises(ValueError, match=r"shape \(nnz_blocks, C, R\), got torch\.int32"):
        bsr.validate(torch.zeros(0, 4, 4, dtype=torch.int32), good, good[:0], (4, 4))
