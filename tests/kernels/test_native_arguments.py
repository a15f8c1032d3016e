"""What the native entry points refuse, and what they make of index arrays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lth import bsr
from sparse_lth.kernels import linear_native

if linear_native.WHY_NOT:
    pytest.skip(f"native kernels are {linear_native.WHY_NOT}", allow_module_level=True)

native = linear_native._native
TOO_MANY = len(linear_native.INSTRUCTION_SETS)
MEMORY = torch.zeros(1 << 10)  # large enough for every call here; as int32, zeros too
P = MEMORY.data_ptr()
LAYER = {
    **{"values": P, "bias": 0, "crow": P, "col": P},
    **{"R": 2, "C": 3, "in": 5, "out": 7, "relu": False},
}
CALL = {"instruction_set": 0, "threads": 1}
SHAPE = (
    CALL
    | {"channels_last": 0, "batch": 2, "channels": 1, "height": 3, "width": 4, "out_channels": 7}
    | {"out_height": 2, "out_width": 3, "kernel height": 2, "kernel width": 2}
    | {"stride y": 1, "stride x": 1, "dilation y": 1, "dilation x": 1, "top": 0, "left": 0}
    | {"R": 2, "C": 3}
)
ARGUMENTS = {
    "conv_forward": SHAPE
    | {"x": P, "y": P, "values": P, "bias": 0, "crow": P, "col": P, "relu": 0, "pool": 1},
    "conv_grad_input": SHAPE | {"grad": P, "dx": P, "slots": P, "values": P, "crow": P, "rows": P},
    "conv_grad_weight": SHAPE | {"grad": P, "x": P, "values": P, "crow": P, "col": P},
    "forward": CALL | {"x": P, "ldx": 5, "y": P, "batch": 4} | LAYER,
    "grad_input": CALL
    | {"grad": P, "ldg": 7, "dx": P, "batch": 4, "slots": P, "values": P, "crow": P, "rows": P}
    | {"C": 3, "R": 2, "out": 7, "in": 5},
    "sddmm": CALL
    | {"grad": P, "x": P, "values": P, "crow": P, "col": P}
    | {"ldg": 7, "ldx": 5, "batch": 4, "R": 2, "C": 3, "in": 5, "out": 7},
}
ONE_BLOCK = torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32)


def calls_with(name):
    """The entry points that take an argument of this name, and arguments that they accept."""
    return [
        (getattr(native, entry), dict(arguments))
        for entry, arguments in ARGUMENTS.items()
        if name in arguments
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("instruction_set", -1, "instruction_set from 0 to"),
        ("instruction_set", TOO_MANY, f"instruction_set from 0 to {TOO_MANY - 1}, got {TOO_MANY}"),
        ("threads", 0, "threads of at least 1, got 0"),
        ("batch", -1, "batch of at least 0, got -1"),
        ("R", 0, "R of at least 1, got 0"),
        ("C", -2, "C of at least 1, got -2"),
        ("in", 0, "in_features of at least 1, got 0"),
        ("out", 0, "out_features of at least 1, got 0"),
        ("out_channels", 0, "out_channels of at least 1, got 0"),
        ("kernel width", 0, "kernel width of at least 1, got 0"),
        ("stride x", -3, "stride of at least 1, got -3"),
        ("dilation y", 0, "dilation of at least 1, got 0"),
        ("left", -1, "padding of at least 0, got -1"),
        ("height", 1 << 40, f"height of 32 bits, got {1 << 40}"),
        ("dilation x", 1 << 30, "fewer numbers"),
        ("pool", 3, "pool 1 or 2, got 3"),
        ("ldx", -1, "stride of at least 0, got -1"),
        ("ldg", -1, "stride of at least 0, got -1"),
        ("x", 0, "address of x, got null"),
        ("y", 0, "address of y, got null"),
        ("grad", 0, "address of grad, got null"),
        ("dx", 0, "address of dx, got null"),
        ("crow", 0, "address of compressed_indices, got null"),
    ],
)
def test_numbers_that_cannot_be_are_refused(name, value, message):
    for call, arguments in calls_with(name):
        call(*arguments.values())
        with pytest.raises(ValueError, match=message):
            call(*(arguments | {name: value}).values())


@pytest.mark.parametrize("name", ["values", "col", "rows", "slots"])
def test_null_is_an_address_where_nothing_is_kept(name):
    for call, arguments in calls_with(name):
        arguments[name] = 0
        call(*arguments.values())
        arguments["crow"] = ONE_BLOCK.data_ptr()
        with pytest.raises(ValueError, match=r"expected the address of \w+, got null"):
            call(*arguments.values())


def test_as_many_ints_as_are_read():
    for call, arguments in calls_with("batch"):
        with pytest.raises(TypeError, match=r"expected \d+ ints"):
            call(*arguments.values(), 0)
        with pytest.raises(OverflowError):
            call(*(arguments | {"batch": 1 << 80}).values())


def test_null_is_an_address_where_there_is_no_batch():
    native.forward(*(ARGUMENTS["forward"] | {"batch": 0, "x": 0, "y": 0}).values())
    for entry in ("grad_input", "conv_grad_input"):
        call = getattr(native, entry)
        call(*(ARGUMENTS[entry] | {"batch": 0, "grad": 0, "dx": 0}).values())
    native.conv_forward(*(ARGUMENTS["conv_forward"] | {"batch": 0, "x": 0, "y": 0}).values())
    values = torch.ones(1, 3, 2)
    arguments = {"batch": 0, "grad": 0, "x": 0, "crow": ONE_BLOCK.data_ptr()}
    arguments["values"] = values.data_ptr()
    native.sddmm(*(ARGUMENTS["sddmm"] | arguments).values())
    assert values.count_nonzero() == 0


def test_a_layer_takes_what_the_one_before_it_gives():
    second = LAYER | {"in": 7, "out": 3}
    native.forward(*ARGUMENTS["forward"].values(), *second.values())
    second["in"] = 6
    with pytest.raises(ValueError, match="expected in_features 7 for layer 1, got 6"):
        native.forward(*ARGUMENTS["forward"].values(), *second.values())


def addresses(*tensors):
    return (t.data_ptr() for t in tensors)


@st.composite
def index_arrays(draw):
    """crow, col, block_cols: valid, but for at most two entries set to something else"""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows, cols = draw(st.integers(0, 9)), draw(st.integers(0, 40))
    keep = torch.rand(rows, cols, generator=generator) < draw(st.floats(0, 1))
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)]).int()
    col = keep.nonzero()[:, 1].int()
    for _ in range(draw(st.integers(0, 2))):
        changed = draw(st.sampled_from([t for t in (crow, col) if len(t)]))
        value = draw(st.integers(-2, 42) | st.sampled_from([-(2**31), 2**31 - 1]))
        changed[draw(st.integers(0, len(changed) - 1))] = value
    return crow, col, cols


def complaint(check, *arguments):
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)


@settings(max_examples=1000, deadline=None)
@given(index_arrays())
def test_indices_are_checked_as_bsr_checks_them(arrays):
    crow, col, cols = arrays
    values, shape = torch.zeros(len(col), 1, 1), (len(crow) - 1, cols)
    expected = complaint(bsr.validate, values, crow, col, shape)
    (crow_at, col_at), lengths = addresses(crow, col), (len(crow), len(col))
    got = complaint(native.check_indices, crow_at, lengths[0], col_at, lengths[1], cols)
    assert got == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10_000))
def test_indices_are_transposed_in_order(rows, cols, density, seed):
    keep = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)]).int()
    row, col = (t.int() for t in keep.nonzero().T)
    col = col.contiguous()
    written = [torch.full((n,), -1, dtype=torch.int32) for n in (cols + 1, len(col), len(col))]
    crow_at, col_at, *written_at = addresses(crow, col, *written)
    native.transpose_indices(crow_at, rows, col_at, len(col), cols, *written_at)
    ccol, t_rows, t_slots = written
    assert ccol.tolist() == [0, *keep.sum(0).cumsum(0).tolist()]
    slots = col.argsort(stable=True)
    assert torch.equal(t_slots, slots.int())
    assert torch.equal(t_rows, row[slots])


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("check_indices", (0, 1, P, 0, 1), "address of crow_indices"),
        ("check_indices", (P, 0, P, 0, 1), "crow_length of at least 1, got 0"),
        ("check_indices", (P, 1, 0, 1, 1), "address of col_indices"),
        ("check_indices", (P, 1, P, -1, 1), "nnz of at least 0, got -1"),
        ("transpose_indices", (P, -1, P, 0, 0, P, P, P), "block_rows of at least 0, got -1"),
        ("transpose_indices", (P, 0, P, 0, -1, P, P, P), "block_cols of at least 0, got -1"),
        ("transpose_indices", (P, 0, P, 0, 0, 0, P, P), "address of ccol_indices"),
        ("transpose_indices", (P, 0, P, 1, 0, P, P, 0), "address of slots"),
    ],
)
def test_index_calls_say_what_they_expected(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(native, call)(*arguments)
