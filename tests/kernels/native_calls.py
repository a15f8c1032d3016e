"""Calls the entry points of a native module on buffers of exactly the size that each may touch.

`python -I -S native_calls.py <module>` needs only the standard library, so that a sanitizer that
test_native_build.py runs it under watches our code and nobody else's.
"""

import ctypes
import importlib.util
import random
import sys
from array import array
from itertools import pairwise, product

BLOCKSIZES = [(1, 1), (16, 16), (16, 3), (32, 20), (8, 8), (24, 1), (4, 4), (1, 9), (3, 5)]
SHAPES = [(1, 1), (13, 30), (65, 39)]  # out_features, in_features
BATCHES = [0, 1, 2, 15, 67, 130]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


class Memory:
    """Arrays, each in an allocation of its own until the end of the `with`."""

    def __enter__(self):
        self._addresses = []
        return self

    def __exit__(self, *_):
        for address in self._addresses:
            libc.free(address)

    def put(self, typecode, items):
        """The address of a copy of the items; 0 for none, as torch has it."""
        data = array(typecode, items).tobytes()
        if not data:
            return 0
        self._addresses.append(libc.malloc(len(data)))
        ctypes.memmove(self._addresses[-1], data, len(data))
        return self._addresses[-1]

    def ones(self, n):
        return self.put("f", [1.0] * n)

    def unwritten(self, n):
        return self.put("f", [float("nan")] * n)

    def rows(self, batch, features, stride):
        return self.ones((batch - 1) * stride + features if batch else 0)


class Weight:
    """A random block-sparse (out_features, in_features) weight of ones, and its transpose."""

    def __init__(self, native, memory, shape, blocksize, density):
        (self.out, self.inputs), (self.R, self.C) = shape, blocksize
        rows, cols = -(-self.out // self.R), -(-self.inputs // self.C)
        kept = [[c for c in range(cols) if random.random() < density] for _ in range(rows)]
        col = [c for row in kept for c in row]
        crow = [sum(map(len, kept[:i])) for i in range(rows + 1)]
        self.nnz = len(col)
        self.crow, self.col = memory.put("i", crow), memory.put("i", col)
        by_column = sorted((c, i) for i, row in enumerate(kept) for c in row)
        pairs = ((i, c) for i, row in enumerate(kept) for c in row)
        place = {pair: n for n, pair in enumerate(pairs)}
        self.ccol = memory.put("i", [sum(c < k for c in col) for k in range(cols + 1)])
        self.rows = memory.put("i", [i for _, i in by_column])
        self.slots = memory.put("i", [place[i, c] for c, i in by_column])
        self.values, self.bias = memory.ones(self.nnz * self.R * self.C), memory.ones(self.out)
        sizes = self.inputs, self.out
        self.program = native.new_program(self.crow, self.col, 0, self.R, self.C, *sizes)
        indices = self.ccol, self.rows, self.slots
        self.transposed = native.new_program(*indices, self.C, self.R, *sizes[::-1])

    def as_layer(self, relu):
        pointers = self.values, self.bias, self.crow, self.col
        return *pointers, self.R, self.C, self.inputs, self.out, relu, self.program

    def in_bf16(self, memory):
        values = memory.put("H", [0x3F80] * (self.nnz * self.R * self.C))
        return values, 0, self.crow, self.col, self.R, self.C, self.inputs, self.out, True, 0

    def in_int8(self, native, memory):
        values, scales = memory.put("b", [1] * (self.nnz * self.R * self.C)), memory.ones(self.out)
        pointers = values, scales, self.bias, self.crow, self.col
        sizes = self.R, self.C, self.inputs, self.out
        return native.new_int8_layer(*pointers, *sizes, True)


def dense(memory, out, inputs):
    """A dense layer, as a chain holds it: a block for each output."""
    crow, col = memory.put("i", range(out + 1)), memory.put("i", [0] * out)
    return memory.ones(out * inputs), 0, crow, col, 1, inputs, inputs, out, False, 0


def check_written(address, n):
    if any(value != value for value in array("f", ctypes.string_at(address, 4 * n))):
        sys.exit("an output was not written")


def forward(native, memory, call, batch, padding, layers):
    inputs, out = layers[0][6], layers[-1][7]
    x, y = memory.rows(batch, inputs, inputs + padding), memory.unwritten(batch * out)
    native.forward(*call, x, inputs + padding, y, batch, *(n for layer in layers for n in layer))
    check_written(y, batch * out)


def gradients(native, memory, call, batch, padding, w):
    ldg, ldx, size = w.out + padding, w.inputs + padding, w.nnz * w.R * w.C
    grad, x = memory.rows(batch, w.out, ldg), memory.rows(batch, w.inputs, ldx)
    dx, dvalues = memory.unwritten(batch * w.inputs), memory.put("f", [0.0] * size)
    indices = w.slots, w.values, w.ccol, w.rows
    native.grad_input(
        *call, grad, ldg, dx, batch, *indices, w.C, w.R, w.out, w.inputs, w.transposed
    )
    check_written(dx, batch * w.inputs)
    sizes = ldg, ldx, batch, w.R, w.C, w.inputs, w.out
    native.sddmm(*call, grad, x, dvalues, w.crow, w.col, *sizes)


def on_words(native, memory, chosen, threads, batch, padding, w):
    """bf16 and both of its gradients, then int8; the batch in whole words of two numbers"""
    one, nnz = 0x3F80, w.nnz * w.R * w.C
    even_in, even_out = w.inputs + w.inputs % 2, w.out + w.out % 2
    ldx, ldg = even_in + 2 * padding, even_out + 2 * padding
    x = memory.put("H", [one] * ((batch - 1) * ldx + even_in if batch else 0))
    grad = memory.put("H", [one] * ((batch - 1) * ldg + even_out if batch else 0))
    values, bias = memory.put("H", [one] * nnz), memory.put("H", [one] * w.out)
    y, dx = (memory.put("H", [0] * (batch * n)) for n in (even_out, even_in))
    dvalues = memory.put("H", [0] * nnz)
    call = min(chosen, len(native.BF16_INSTRUCTION_SETS) - 1), threads
    sizes = w.R, w.C, w.inputs, w.out
    native.bf16_forward(*call, x, ldx, y, batch, values, bias, w.crow, w.col, *sizes, True, 0)
    back = w.C, w.R, w.out, w.inputs
    native.bf16_forward(
        *(*call, grad, ldg, dx, batch, values, 0, w.ccol, w.rows, *back, False, w.slots)
    )
    native.bf16_sddmm(*call, grad, x, dvalues, w.crow, w.col, ldg, ldx, batch, *sizes)
    call = min(chosen, len(native.INT8_INSTRUCTION_SETS) - 1), threads
    x, y = memory.rows(batch, w.inputs, w.inputs + padding), memory.unwritten(batch * w.out)
    layer = w.in_int8(native, memory)
    native.int8_forward(*call, x, w.inputs + padding, y, batch, layer)
    check_written(y, batch * w.out)


def one_layer(native, call, shape, blocksize, density, batches):
    for batch, padding in product(batches, (0, 3)):
        with Memory() as memory:
            weight = Weight(native, memory, shape, blocksize, density)
            if call[0] < len(native.INSTRUCTION_SETS):
                forward(native, memory, call, batch, padding, [weight.as_layer(relu=True)])
                gradients(native, memory, call, batch, padding, weight)
            on_words(native, memory, *call, batch, padding, weight)


def chain(native, call, batch):
    """Tall, wide, dense and tall again, of sizes that blocks do not divide."""
    with Memory() as memory:
        shapes = {(16, 16): (300, 290), (1, 1): (210, 300), (8, 3): (33, 100)}
        tall, wide, last = (
            Weight(native, memory, shape, blocksize, 0.3).as_layer(relu=True)
            for blocksize, shape in shapes.items()
        )
        layers = [tall, wide, dense(memory, 100, 210), last]
        forward(native, memory, call, batch, 0, layers)


def chain_on_words(native, chosen, threads, batch):
    """Lanes between layers with planes and with words, then rows, and lanes again."""
    with Memory() as memory:
        blocks = [(1, 1), (3, 5), (2, 4), (4, 1), (16, 16), (8, 8)]
        sizes = [290, 300, 211, 33, 100, 64, 21]
        weights = [
            Weight(native, memory, shape[::-1], blocksize, 0.3)
            for blocksize, shape in zip(blocks, pairwise(sizes), strict=True)
        ]
        x = memory.put("H", [0x3F80] * (batch * sizes[0]))
        y = memory.put("H", [0] * (batch * 22))
        call = min(chosen, len(native.BF16_INSTRUCTION_SETS) - 1), threads
        layers = [n for w in weights for n in w.in_bf16(memory)]
        native.bf16_forward(*call, x, sizes[0], y, batch, *layers)
        x, y = memory.ones(batch * sizes[0]), memory.unwritten(batch * 21)
        call = min(chosen, len(native.INT8_INSTRUCTION_SETS) - 1), threads
        layers = [w.in_int8(native, memory) for w in weights]
        native.int8_forward(*call, x, sizes[0], y, batch, *layers)
        check_written(y, batch * 21)


def convolution(native, call, blocksize, channels_last, kernel, stride, dilation, pad, size, batch):
    """A forward pass, pooled too, and both gradients; kernel .. size are (vertical, horizontal)"""
    channels, out = 3, 21
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = zip(size, pad, spans, stride, strict=True)
    after = [(n + 2 * p - s) // t + 1 for n, p, s, t in sizes]
    if min(after) < 1:
        return
    pixels, outputs = (batch * n * a * b for n, (a, b) in ((channels, size), (out, after)))
    with Memory() as memory:
        w = Weight(native, memory, (out, channels * kernel[0] * kernel[1]), blocksize, 0.4)
        shape = *call, channels_last, batch, channels, *size, out, *after
        shape = *shape, *kernel, *stride, *dilation, *pad, *blocksize
        x, grad, dx = memory.ones(pixels), memory.ones(outputs), memory.put("f", [0.0] * pixels)
        for pool in (1, 2):
            pooled = batch * out * (after[0] // pool) * (after[1] // pool)
            y = memory.unwritten(pooled)
            weight = w.values, w.bias, w.crow, w.col
            if pooled or not batch:
                native.conv_forward(*shape, x, y, *weight, True, pool)
                check_written(y, pooled)
        native.conv_grad_input(*shape, grad, dx, w.slots, w.values, w.ccol, w.rows)
        dvalues = memory.put("f", [0.0] * (w.nnz * w.R * w.C))
        native.conv_grad_weight(*shape, grad, x, dvalues, w.crow, w.col)


def convolutions(native, call):
    pairs = [(1, 1), (2, 1), (3, 2)]
    for blocksize, channels_last in product([(1, 1), (16, 1), (8, 2), (3, 5)], (False, True)):
        options = blocksize, channels_last
        for kernel, stride in product([(1, 1), (3, 3), (2, 5)], pairs):
            for dilation, pad, size, batch in (
                ((1, 1), (0, 0), (5, 7), 3),
                ((1, 1), (1, 2), (14, 14), 2),
                ((2, 1), (2, 0), (9, 33), 1),
                ((1, 2), (1, 9), (2, 3), 0),
            ):
                convolution(native, call, *options, kernel, stride, dilation, pad, size, batch)
        convolution(native, call, *options, (3, 3), (1, 1), (1, 1), (1, 1), (130, 220), 2)  # tiles


def main(path):
    spec = importlib.util.spec_from_file_location("_native", path)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    random.seed(0)
    types = native.INSTRUCTION_SETS, native.BF16_INSTRUCTION_SETS, native.INT8_INSTRUCTION_SETS
    for chosen, blocksize in product(range(max(map(len, types))), BLOCKSIZES):
        for shape, density in product(SHAPES, (0, 0.4, 1)):
            one_layer(native, (chosen, 1), shape, blocksize, density, BATCHES)
        one_layer(native, (chosen, 3), (300, 290), blocksize, 0.5, (33, 200))  # several threads
        one_layer(native, (chosen, 1), (9, 4400), blocksize, 0.1, (33,))  # ranges of inputs
    for chosen, threads, batch in product(range(max(map(len, types))), (1, 3), (1, 15, 50, 200)):
        chain_on_words(native, chosen, threads, batch)
    for call in product(range(len(native.INSTRUCTION_SETS)), (1, 3)):
        for batch in (1, 15, 200):
            chain(native, call, batch)
        convolutions(native, call)
    if foreign := {"numpy", "torch", "triton"} & set(sys.modules):
        sys.exit(f"expected only the standard library in the process, got {foreign}")
    print("called", *native.INSTRUCTION_SETS)


if __name__ == "__main__":
    main(sys.argv[1])
