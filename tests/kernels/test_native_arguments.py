"""What the native entry points refuse."""

import pytest
import torch

from sparse_lth.kernels import linear_native

if linear_native.WHY_NOT:
    pytest.skip(f"native kernels are {linear_native.WHY_NOT}", allow_module_level=True)

native = linear_native._native
TOO_MANY = 9
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
    "forward": CALL | {"x": P, "ldx": 5, "y": P, "batch": 4} | LAYER | {"program": 0},
    "grad_input": CALL
    | {"grad": P, "ldg": 7, "dx": P, "batch": 4, "slots": P, "values": P, "crow": P, "rows": P}
    | {"C": 3, "R": 2, "out": 7, "in": 5, "program": 0},
    "sddmm": CALL
    | {"grad": P, "x": P, "values": P, "crow": P, "col": P}
    | {"ldg": 7, "ldx": 5, "batch": 4, "R": 2, "C": 3, "in": 5, "out": 7},
}
NEW_INT8_LAYER = {"values": P, "scales": P} | {
    name: number for name, number in LAYER.items() if name != "values"
}
INT8_LAYER = native.new_int8_layer(*NEW_INT8_LAYER.values())
ARGUMENTS |= {
    "bf16_forward": CALL | {"x": P, "ldx": 6, "y": P, "batch": 4} | LAYER | {"transposed": P},
    "bf16_sddmm": ARGUMENTS["sddmm"] | {"ldg": 8, "ldx": 6},
    "int8_forward": CALL | {"x": P, "ldx": 5, "y": P, "batch": 4, "layer": INT8_LAYER},
    "new_int8_layer": NEW_INT8_LAYER,
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
        ("instruction_set", TOO_MANY, f"instruction_set from 0 to .*, got {TOO_MANY}"),
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
        ("scales", 0, "address of scales, got null"),
        ("layer", 0, "address of layer, got null"),
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
            call(*[*arguments.values()][:-1])
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
    second = LAYER | {"in": 7, "out": 3, "program": 0}
    native.forward(*ARGUMENTS["forward"].values(), *second.values())
    second["in"] = 6
    with pytest.raises(ValueError, match="expected in_features 7 for layer 1, got 6"):
        native.forward(*ARGUMENTS["forward"].values(), *second.values())
