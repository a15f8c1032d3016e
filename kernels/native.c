/* The module sparse_lth.kernels._native: picks an instruction set, and reads the ints it is called
   with, of which some are addresses. They are checked against each other. What is at an address
   is trusted, indices above all: pattern.py checks those. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <fcntl.h>

#include "native.h"

/* Blocks of 8 outputs are a vector of AVX2, and of 4 of the baseline, also where there is more. */
#define TABLE(suffix, suffix8)                                                                     \
    {                                                                                              \
        .name = #suffix, .lanes = LANES, .tall16 = tall16_##suffix, .tall8 = tall8_##suffix8,      \
        .tall4 = tall4_baseline,                                                                   \
        .panels = panels_##suffix, .single = single_##suffix, .transpose = transpose_##suffix,     \
        .sddmm_tall16 = sddmm_tall16_##suffix, .sddmm_tall8 = sddmm_tall8_##suffix8,               \
        .sddmm_wide = sddmm_wide_##suffix, .conv = conv_##suffix, .pool = pool_##suffix,           \
        .conv_grad_input = conv_grad_input_##suffix, .conv_grad_weight = conv_grad_weight_##suffix \
    }

#define NAME(f) f##_baseline
#define TARGET
#define LANES 4
#ifdef __x86_64__
#define ROWS 2
#define WIDEST 4
#else
#define ROWS 6
#define WIDEST 8
#endif
#include "linear_cpu.c"
#include "sddmm_cpu.c"
#include "conv_cpu.c"
static const Kernels kernels_baseline = TABLE(baseline, baseline);
#include "undefine.h"

#ifdef __x86_64__
#define NAME(f) f##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define WIDEST 4
#include "linear_cpu.c"
#include "sddmm_cpu.c"
#include "conv_cpu.c"
static const Kernels kernels_avx2 = TABLE(avx2, avx2);
#include "undefine.h"

#define NAME(f) f##_avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define LANES 16
#define ROWS 14
#define WIDEST 8
#include "linear_cpu.c"
#include "sddmm_cpu.c"
#include "conv_cpu.c"
static const Kernels kernels_avx512 = TABLE(avx512, avx2);
#include "undefine.h"
#endif

#include "jit.c"

/* What this machine can run, the best first; a caller names one by its index. */
static const Kernels *usable[4];
static int n_usable;

/* Why no machine code is made from patterns, or NULL where it is. */
static const char *why_no_code = "it needs x86-64 with AVX-512";

static void find_usable(void)
{
    n_usable = 0;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
        static Kernels with_code;
        const char *wanted = getenv("SPARSE_LTH_JIT");
        with_code = kernels_avx512;
        with_code.name = "avx512_jit";
        with_code.code_of = code_of;
        with_code.run_code = run_code;
        why_no_code = wanted && strcmp(wanted, "0") == 0 ? "SPARSE_LTH_JIT=0"
                      : may_execute()                    ? NULL
                                      : "this process may not execute memory that it wrote";
        if (!why_no_code)
            usable[n_usable++] = &with_code;
        usable[n_usable++] = &kernels_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        usable[n_usable++] = &kernels_avx2;
#endif
    usable[n_usable++] = &kernels_baseline;
}

#include "batch.c"
#include "conv.c"
#include "words_sets.c"
#include "words.c"

/* Reads exactly n ints, or the addresses in capsules; 0, or -1 with an exception set. */
static int ints(PyObject *const *args, Py_ssize_t nargs, Py_ssize_t n, long long *to)
{
    if (nargs != n) {
        PyErr_Format(PyExc_TypeError, "expected %zd ints, got %zd arguments", n, nargs);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        to[i] = PyCapsule_CheckExact(args[i]) ? (intptr_t)PyCapsule_GetPointer(args[i], NULL)
                                              : PyLong_AsLongLong(args[i]);
    return PyErr_Occurred() ? -1 : 0;
}

/* Reads the arguments of a call on layers: `head` ints, then `per_layer` for each; 0, or -1 with an
   exception set. */
static int ints_of_layers(PyObject *const *args, Py_ssize_t nargs, int head, int per_layer,
                          long long *to)
{
    const Py_ssize_t n = (nargs - head) / per_layer;
    if (n < 1 || n > MAX_LAYERS || nargs != head + n * per_layer) {
        PyErr_Format(PyExc_TypeError, "expected %d ints and %d for each of 1 to %d layers, got %zd",
                     head, per_layer, MAX_LAYERS, nargs);
        return -1;
    }
    return ints(args, nargs, nargs, to);
}

/* The checks: each returns 0, or another number with a ValueError set. */

static int check_follows(Py_ssize_t layer, long long out, long long in)
{
    if (in == out)
        return 0;
    PyErr_Format(PyExc_ValueError, "expected in_features %lld for layer %zd, got %lld", out, layer,
                 in);
    return -1;
}

static int check_at_least(long long least, const char *name, long long value)
{
    if (value >= least)
        return 0;
    PyErr_Format(PyExc_ValueError, "expected %s of at least %lld, got %lld", name, least, value);
    return -1;
}

static int check_given(const char *name, const void *address)
{
    if (address)
        return 0;
    PyErr_Format(PyExc_ValueError, "expected the address of %s, got null", name);
    return -1;
}

static int check_call(long long instruction_set, long long threads, long long batch)
{
    if (instruction_set < 0 || instruction_set >= n_usable) {
        PyErr_Format(PyExc_ValueError, "expected instruction_set from 0 to %d, got %lld",
                     n_usable - 1, instruction_set);
        return -1;
    }
    return check_at_least(1, "threads", threads) || check_at_least(0, "batch", batch);
}

/* x: (batch, features), `stride` floats from row to row, which may overlap; or no row at all */
static int check_rows(const char *name, const float *x, long long stride, long long batch)
{
    if (batch == 0)
        return 0;
    return check_given(name, x) || check_at_least(0, "stride", stride);
}

static int check_sizes(int64_t R, int64_t C, int64_t in, int64_t out)
{
    return check_at_least(1, "R", R) || check_at_least(1, "C", C) ||
           check_at_least(1, "in_features", in) || check_at_least(1, "out_features", out);
}

/* The blocks of a weight or its transpose; where none is kept, only `compressed` is not null. */
static int check_blocks(const float *values, const int32_t *compressed, int64_t length,
                        const int32_t *plain)
{
    if (check_given("compressed_indices", compressed))
        return -1;
    if (compressed[length - 1] == 0)
        return 0;
    return check_given("values", values) || check_given("plain_indices", plain);
}

/* None, or NULL with a MemoryError set */
static PyObject *none_or_no_memory(int failed)
{
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static void free_program_of(PyObject *capsule)
{
    free_program(PyCapsule_GetPointer(capsule, NULL));
}

/* new_program(crow, col, slots, R, C, in, out): a Program in a capsule, which frees it; slots: 0,
   or of a transposed pattern. What the addresses name must outlive it. */
static PyObject *py_new_program(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { CROW, COL, SLOTS, R, C, IN, OUT, ARGUMENTS };
    long long a[ARGUMENTS];
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a))
        return NULL;
    const int32_t *crow = (int32_t *)a[CROW], *col = (int32_t *)a[COL];
    if (check_sizes(a[R], a[C], a[IN], a[OUT]) || check_given("compressed_indices", crow) ||
        (crow[ceil_div(a[OUT], a[R])] && check_given("plain_indices", col)))
        return NULL;
    Program *p = calloc(1, sizeof *p);
    if (!p)
        return PyErr_NoMemory();
    *p = (Program){.crow = crow, .col = col, .slots = (int32_t *)a[SLOTS], .R = a[R], .C = a[C],
                   .in = a[IN], .out = a[OUT]};
    return PyCapsule_New(p, NULL, free_program_of);
}

/* 0, or -1 with a ValueError set unless the program was made for such a layer; it may be NULL */
static int check_program(const Program *p, const Layer *l)
{
    if (!p || (p->R == l->R && p->C == l->C && p->in == l->in && p->out == l->out &&
               p->crow == l->crow && p->col == l->col))
        return 0;
    PyErr_SetString(PyExc_ValueError, "expected the program of the layer, got that of another");
    return -1;
}

/* forward(instruction_set, threads, x, ldx, y, batch, *layers)
   a layer: values, bias, crow, col, R, C, in, out, relu, program (or 0)
   y (batch, out of the last) is written */
static PyObject *py_forward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { INSTRUCTION_SET, THREADS, X, LDX, Y, BATCH, HEAD };
    enum { VALUES, BIAS, CROW, COL, R, C, IN, OUT, RELU, PROGRAM, PER_LAYER };
    long long a[HEAD + PER_LAYER * MAX_LAYERS];
    Layer layers[MAX_LAYERS];
    const Py_ssize_t n = (nargs - HEAD) / PER_LAYER;
    (void)self;
    if (ints_of_layers(args, nargs, HEAD, PER_LAYER, a))
        return NULL;
    for (Py_ssize_t j = 0; j < n; j++) {
        const long long *l = a + HEAD + j * PER_LAYER;
        layers[j] = (Layer){.values = (float *)l[VALUES], .bias = (float *)l[BIAS],
                            .crow = (int32_t *)l[CROW], .col = (int32_t *)l[COL], .R = l[R],
                            .C = l[C], .in = l[IN], .out = l[OUT], .relu = l[RELU] != 0,
                            .program = (Program *)l[PROGRAM]};
        if (check_sizes(l[R], l[C], l[IN], l[OUT]) ||
            check_blocks(layers[j].values, layers[j].crow, block_rows(&layers[j]) + 1,
                         layers[j].col) ||
            check_program(layers[j].program, &layers[j]))
            return NULL;
        if (j && check_follows(j, layers[j - 1].out, layers[j].in))
            return NULL;
    }
    const float *x = (float *)a[X];
    float *y = (float *)a[Y];
    if (check_call(a[INSTRUCTION_SET], a[THREADS], a[BATCH]) ||
        check_rows("x", x, a[LDX], a[BATCH]) || check_rows("y", y, layers[n - 1].out, a[BATCH]))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = forward(usable[a[INSTRUCTION_SET]], layers, (int)n, x, a[LDX], y, a[BATCH],
                     (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}

/* grad_input(instruction_set, threads, grad, ldg, dx, batch, slots, values, ccol, rows, C, R, out,
   in, program); dx (batch, in) is written */
static PyObject *py_grad_input(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { INSTRUCTION_SET, THREADS, GRAD, LDG, DX, BATCH, SLOTS, VALUES, CCOL, ROWS, C, R, OUT,
           IN, PROGRAM, ARGUMENTS };
    long long a[ARGUMENTS];
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a))
        return NULL;
    const float *grad = (float *)a[GRAD];
    float *dx = (float *)a[DX];
    const int32_t *slots = (int32_t *)a[SLOTS];
    const Layer transposed = {.values = (float *)a[VALUES], .crow = (int32_t *)a[CCOL],
                              .col = (int32_t *)a[ROWS], .R = a[C], .C = a[R], .in = a[OUT],
                              .out = a[IN], .program = (Program *)a[PROGRAM]};
    if (check_call(a[INSTRUCTION_SET], a[THREADS], a[BATCH]) ||
        check_rows("grad", grad, a[LDG], a[BATCH]) || check_rows("dx", dx, a[IN], a[BATCH]) ||
        check_sizes(a[R], a[C], a[IN], a[OUT]) ||
        check_blocks(transposed.values, transposed.crow, block_rows(&transposed) + 1,
                     transposed.col) ||
        (kept_weights(&transposed) && check_given("slots", slots)) ||
        check_program(transposed.program, &transposed))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = grad_input(usable[a[INSTRUCTION_SET]], &transposed, slots, grad, a[LDG], dx, a[BATCH],
                        (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}

/* sddmm(instruction_set, threads, grad, x, values, crow, col, ldg, ldx, batch, R, C, in, out);
   values (nnz, C, R) is written but for what is padding, which must be 0 before */
static PyObject *py_sddmm(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { INSTRUCTION_SET, THREADS, GRAD, X, VALUES, CROW, COL, LDG, LDX, BATCH, R, C, IN, OUT,
           ARGUMENTS };
    long long a[ARGUMENTS];
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a))
        return NULL;
    const Gradient g = {.grad = (float *)a[GRAD], .x = (float *)a[X], .values = (float *)a[VALUES],
                        .crow = (int32_t *)a[CROW], .col = (int32_t *)a[COL], .ldg = a[LDG],
                        .ldx = a[LDX], .batch = a[BATCH], .R = a[R], .C = a[C], .in = a[IN],
                        .out = a[OUT]};
    if (check_call(a[INSTRUCTION_SET], a[THREADS], a[BATCH]) ||
        check_rows("grad", g.grad, a[LDG], a[BATCH]) || check_rows("x", g.x, a[LDX], a[BATCH]) ||
        check_sizes(a[R], a[C], a[IN], a[OUT]) ||
        check_blocks(g.values, g.crow, ceil_div(g.out, g.R) + 1, g.col))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = sddmm(usable[a[INSTRUCTION_SET]], &g, (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}

#include "conv_calls.c"
#include "tensors.c"
#include "words_calls.c"

static PyMethodDef methods[] = {
    {"new_program", (PyCFunction)(void (*)(void))py_new_program, METH_FASTCALL, NULL},
    {"forward", (PyCFunction)(void (*)(void))py_forward, METH_FASTCALL, NULL},
    {"grad_input", (PyCFunction)(void (*)(void))py_grad_input, METH_FASTCALL, NULL},
    {"sddmm", (PyCFunction)(void (*)(void))py_sddmm, METH_FASTCALL, NULL},
    {"conv_forward", (PyCFunction)(void (*)(void))py_conv_forward, METH_FASTCALL, NULL},
    {"conv_grad_input", (PyCFunction)(void (*)(void))py_conv_grad_input, METH_FASTCALL, NULL},
    {"conv_grad_weight", (PyCFunction)(void (*)(void))py_conv_grad_weight, METH_FASTCALL, NULL},
    {"bf16_forward", (PyCFunction)(void (*)(void))py_bf16_forward, METH_FASTCALL, NULL},
    {"new_int8_layer", (PyCFunction)(void (*)(void))py_new_int8_layer, METH_FASTCALL, NULL},
    {"int8_forward", (PyCFunction)(void (*)(void))py_int8_forward, METH_FASTCALL, NULL},
    {"bf16_sddmm", (PyCFunction)(void (*)(void))py_bf16_sddmm, METH_FASTCALL, NULL},
    {"use_dlpack", py_use_dlpack, METH_O, NULL},
    {"unchanged", py_unchanged, METH_O, NULL},
    {"call", (PyCFunction)(void (*)(void))py_call, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void)
{
    find_usable();
    find_usable_words();
    load_file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    processors = sysconf(_SC_NPROCESSORS_ONLN);
    openmp = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    pthread_atfork(NULL, NULL, after_fork);
    PyObject *m = PyModule_Create(&module), *names = PyTuple_New(n_usable);
    if (!m || !names || add_names_of_tensors())
        return NULL;
    for (int i = 0; i < n_usable; i++)
        PyTuple_SET_ITEM(names, i, PyUnicode_FromString(usable[i]->name));
    PyModule_AddIntMacro(m, MAX_LAYERS);
    PyModule_AddObject(m, "INSTRUCTION_SETS", names);
    PyModule_AddStringConstant(m, "WHY_NO_CODE", why_no_code ? why_no_code : "");
    return add_word_sets(m) ? NULL : m;
}
