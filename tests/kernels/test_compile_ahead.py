"""What the compiler makes of every kernel and tile of the table, for GPUs that are not here."""

import re
import subprocess

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparse_lth.kernels import linear_triton, sddmm_triton, tiles  # noqa: E402

TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
INDICES = ["crow_ptr", "row_ptr", "col_ptr", "order_ptr", "ccol_ptr", "t_row_ptr", "t_slot_ptr"]
UNSPECIALIZED = ["batch", "block_rows", "block_cols"]
KERNELS = {
    "linear": linear_triton._linear_kernel,
    "grad_input": linear_triton._grad_input_kernel,
    "sddmm": sddmm_triton._sddmm_kernel,
}
DEVICES = {
    "sm_80": tiles.Device("A100", 80, 108, 166912),
    "sm_90": tiles.Device("H200", 90, 132, 232448),
    "sm_100": tiles.Device("B200", 100, 148, 232448),
    "sm_120": tiles.Device("RTX 5090", 120, 170, 101376),
    "gfx942": tiles.Device("MI300X", 0, 304, 65536),
    "gfx1100": tiles.Device("RX 7900", 0, 96, 65536),
}
TARGETS = {name: GPUTarget("cuda", device.capability, 32) for name, device in DEVICES.items()}
TARGETS |= {"gfx942": GPUTarget("hip", "gfx942", 64), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
newer = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="older Triton wheels lack the linker for AMD's GPUs, and spill on sm_120",
)
MEASURED = ("sm_80", "sm_90")  # every tile; elsewhere those of a few cases
BLOCKS = {  # height x width; the 16-bit types differ in one letter of an instruction
    "float16": [(16, 16), (64, 16), (128, 64)],
    "bfloat16": [(16, 16), (128, 64)],
    "float32": [(16, 16), (128, 64)],
}
NARROW = [(128, 1), (48, 5)]
SHORT_COPY = r"cp\.async[.\w]* \[[^]]+\], \[[^]]+\], 0x[48],"  # of less than 16 bytes


class Compiled:
    """A kernel as the launcher would have it compiled: aligned pointers and strides.

    odd: the numbers that 16 does not divide; wide: the pointers to fp32
    """

    def __init__(self, fn, dtype, arch, constants, options, odd=(), wide=()):
        constants = {name: value for name, value in constants.items() if name in fn.arg_names}
        signature, attrs = {}, {}
        for i, name in enumerate(fn.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*i32" if name in INDICES else f"*{TYPES[dtype]}"
            else:
                signature[name] = "i32"
            if name in wide:
                signature[name] = "*fp32"
            if name not in constants and name not in odd and name not in UNSPECIALIZED:
                attrs[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn, signature, constexprs=constants, attrs=attrs)
        kernel = triton.compile(source, target=TARGETS[arch], options=options)
        self.shared = kernel.metadata.shared
        self.assembly = kernel.asm.get("ptx") or kernel.asm["amdgcn"]

    def spilled_bytes(self, tmp_path):
        """By an assembler that comes with Triton: newer ones have a second, for newer PTX."""
        if spills := re.findall(r"\.[sv]gpr_spill_count: +(\d+)", self.assembly):  # AMD's
            return sum(map(int, spills))
        path = tmp_path / "kernel.ptx"
        path.write_text(self.assembly)
        arch = re.search(r"\.target (\w+)", self.assembly)[1]
        nvidia = triton.knobs.nvidia
        for tool in (nvidia.ptxas, getattr(nvidia, "ptxas_blackwell", nvidia.ptxas)):
            command = [tool.path, "-v", f"-arch={arch}", str(path), "-o", str(tmp_path / "cubin")]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode == 0:
                return sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", run.stderr)))
        raise AssertionError(run.stderr)


def _compile(case, arch, activation="none", splits=1, ragged=False, odd=()):
    R, C = (case.height, case.width) if case.op != "grad_input" else (case.width, case.height)
    constants = tiles.constants(tiles.of_case(case, DEVICES[arch], activation))
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants |= {"C": C, "R": R, "RAGGED": ragged, "PRECISION": "ieee"}
    constants |= {"ACTIVATION": activation, "SPLITS": splits}
    parts = ("y_ptr", "dvalues_ptr") if splits > 1 else ()
    return Compiled(KERNELS[case.op], case.dtype, arch, constants, options, odd, parts)


def _case(op, dtype, block, batch):
    return tiles.Case(op, dtype, *block, batch)


@pytest.fixture(autouse=True)
def _from_the_table(monkeypatch):
    monkeypatch.setattr(tiles, "tuned", lambda name: {})


def _cases():
    cases = [(dtype, block, tiles.BATCHES) for dtype in TYPES for block in BLOCKS[dtype]]
    cases += [("float16", block, (16, tiles.BATCHES[-1])) for block in NARROW]
    for dtype, block, batches in cases:
        yield "sddmm", dtype, block, batches[-1]
        for batch in batches:
            yield "linear", dtype, block, batch
            if batch > 1:
                yield "grad_input", dtype, block, batch


@pytest.mark.parametrize("arch", MEASURED)
@pytest.mark.parametrize(("op", "dtype", "block", "batch"), list(_cases()))
def test_every_tile(arch, op, dtype, block, batch, tmp_path):
    activation = "gelu" if op == "linear" and batch < 512 else "none"
    case = _case(op, dtype, block, batch)
    compiled = _compile(case, arch, activation)
    tile, ptx = tiles.of_case(case, DEVICES[arch], activation), compiled.assembly
    assert compiled.spilled_bytes(tmp_path) == 0
    assert compiled.shared <= DEVICES[arch].shared_memory
    if dtype == "float32":
        return
    height, width = block
    if width >= 8 and batch > 1:
        assert not re.search(r"ld\.global[.\w]*[bu]16", ptx)
        assert not re.search(SHORT_COPY, ptx)
        rows, cols = tile.block_m, tile.block_k
        if op == "sddmm":
            rows, cols = cols, rows
        buffers = tile.stages if arch == "sm_90" and rows >= 64 else tile.stages - 1
        tiles_of_a_stage = cols * (rows + tile.block_n) * 2
        assert compiled.shared >= buffers * tiles_of_a_stage
    if arch == "sm_90" and height >= 64 and width >= 8 and batch > 16:
        assert "wgmma" in ptx


@newer
@pytest.mark.parametrize("arch", [arch for arch in DEVICES if arch not in MEASURED])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("block", [(16, 16), (128, 64)])
@pytest.mark.parametrize(("op", "batch"), [(op, tiles.BATCHES[-1]) for op in KERNELS])
def test_other_gpus(arch, op, dtype, block, batch, tmp_path):
    compiled = _compile(_case(op, dtype, block, batch), arch)
    if arch != "gfx1100":  # whose compiler spills with most of these tiles
        assert compiled.spilled_bytes(tmp_path) == 0
    assert compiled.shared <= DEVICES[arch].shared_memory


@pytest.mark.parametrize("arch", MEASURED)
@pytest.mark.parametrize("op", ["linear", "sddmm"])
def test_odd_widths_are_pipelined_as_even_ones(arch, op):
    case = _case(op, "float16", (128, 16), tiles.BATCHES[-1])
    widths = ("in_features", "out_features", "numel")
    odd = _compile(case, arch, ragged=True, odd=widths)
    assert odd.shared == _compile(case, arch).shared
    assert not re.search(SHORT_COPY, odd.assembly)


@pytest.mark.parametrize("arch", MEASURED)
@pytest.mark.parametrize("op", ["linear", "sddmm"])
def test_sums_in_parts(arch, op, tmp_path):
    case = _case(op, "float16", (64, 16), 512)
    assert _compile(case, arch, splits=4).spilled_bytes(tmp_path) == 0
    constants = {"ACTIVATION": "gelu", "SPLITS": 4, "BLOCK": 1024}
    reduce = linear_triton._reduce_kernel
    options, parts = {"enable_fp_fusion": True}, ("parts_ptr",)
    compiled = Compiled(reduce, "float16", arch, constants, options, wide=parts)
    assert compiled.spilled_bytes(tmp_path) == 0


@newer
@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("block", [(1, 1), (128, 16)])
def test_unpacking(arch, block, tmp_path):
    constants = {"R": block[0], "C": block[1], "BLOCK": 1024}
    kernel = linear_triton._to_dense_kernel
    compiled = Compiled(kernel, "bfloat16", arch, constants, {})
    assert compiled.spilled_bytes(tmp_path) == 0
