/* The entry points on bf16 and int8. Included after those on float32, whose checks they use. */

enum { MOST_INT8_INPUTS = 65536 }; /* 255 * 127 * so many fit 32 bits */

static int check_word_call(const WordSets *sets, const long long *a)
{
    if (a[0] < 0 || a[0] >= sets->n) {
        PyErr_Format(PyExc_ValueError, "expected instruction_set from 0 to %d, got %lld",
                     sets->n - 1, a[0]);
        return -1;
    }
    return check_at_least(1, "threads", a[1]);
}

/* x: (batch, features) of bf16 in whole words, `stride` numbers from row to row */
static int check_word_rows(const char *name, const void *x, long long stride, long long batch)
{
    if (check_at_least(0, "batch", batch) || check_rows(name, x, stride, batch))
        return -1;
    if (batch == 0 || (stride % 2 == 0 && (uintptr_t)x % 4 == 0))
        return 0;
    PyErr_Format(PyExc_ValueError, "expected rows of %s in whole words, got a stride of %lld", name,
                 stride);
    return -1;
}

static int check_word_layer(const WordLayer *l, const void *values)
{
    return check_sizes(l->R, l->C, l->in, l->out) ||
           check_blocks(values, l->crow, ceil_div(l->out, l->R) + 1, l->col);
}

/* bf16_forward(instruction_set, threads, x, ldx, y, batch, *layers)
   a layer: values, bias, crow, col, R, C, in, out, relu, slots; bias: (out,) of bf16 or null
   slots: null, or block t is the transpose of block slots[t] of values (nnz, R, C)
   y (batch, out of the last rounded up to even) is written */
static PyObject *py_bf16_forward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { SET, THREADS, X, LDX, Y, BATCH, HEAD };
    enum { VALUES, BIAS, CROW, COL, R, C, IN, OUT, RELU, SLOTS, PER_LAYER };
    long long a[HEAD + PER_LAYER * MAX_LAYERS];
    WordLayer layers[MAX_LAYERS];
    Blocks blocks[MAX_LAYERS];
    const int n = (int)((nargs - HEAD) / PER_LAYER);
    (void)self;
    if (ints_of_layers(args, nargs, HEAD, PER_LAYER, a))
        return NULL;
    for (int j = 0; j < n; j++) {
        const long long *l = a + HEAD + j * PER_LAYER;
        const int32_t *slots = (int32_t *)l[SLOTS];
        layers[j] = (WordLayer){.values = slots ? NULL : (char *)l[VALUES],
                                .crow = (int32_t *)l[CROW], .col = (int32_t *)l[COL], .R = l[R],
                                .C = l[C], .in = l[IN], .out = l[OUT], .per_word = 2,
                                .planes = l[C] % 2 != 0, .bias = (void *)l[BIAS],
                                .relu = l[RELU] != 0};
        blocks[j] = (Blocks){.values = (void *)l[VALUES], .slots = slots,
                             .output_step = slots ? l[C] : 1, .input_step = slots ? 1 : l[R]};
        if (check_word_layer(&layers[j], blocks[j].values))
            return NULL;
        if (j && check_follows(j, layers[j - 1].out, layers[j].in))
            return NULL;
    }
    if (check_word_call(&bf16_sets, a) ||
        check_word_rows("x", (void *)a[X], a[LDX], a[BATCH]) ||
        check_word_rows("y", (void *)a[Y], 0, a[BATCH]))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = word_forward(bf16_sets.kernels[a[SET]], layers, blocks, n, (void *)a[X], 2 * a[LDX],
                          (void *)a[Y], a[BATCH], (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}

/* bf16_sddmm(instruction_set, threads, grad, x, values, crow, col, ldg, ldx, batch, R, C, in, out);
   values (nnz, C, R) is written */
static PyObject *py_bf16_sddmm(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { SET, THREADS, GRAD, X, VALUES, CROW, COL, LDG, LDX, BATCH, R, C, IN, OUT, ARGUMENTS };
    long long a[ARGUMENTS];
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a))
        return NULL;
    WordLayer l = {.crow = (int32_t *)a[CROW], .col = (int32_t *)a[COL], .R = a[R], .C = a[C],
                   .in = a[IN], .out = a[OUT], .per_word = 2, .planes = 1};
    void *grad = (void *)a[GRAD], *x = (void *)a[X], *values = (void *)a[VALUES];
    if (check_word_call(&bf16_sets, a) || check_word_layer(&l, values) ||
        check_word_rows("grad", grad, a[LDG], a[BATCH]) ||
        check_word_rows("x", x, a[LDX], a[BATCH]))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = word_sddmm(bf16_sets.kernels[a[SET]], &l, grad, a[LDG] / 2, x, a[LDX] / 2, a[BATCH],
                        values, (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}

static void free_int8_layer_of(PyObject *capsule)
{
    WordLayer *l = PyCapsule_GetPointer(capsule, NULL);
    free((void *)l->totals);
    free(l->memory);
    free(l);
}

/* new_int8_layer(values, scales, bias, crow, col, R, C, in, out, relu): a layer in a capsule, which
   frees it
   values (nnz, C, R): int8, of which a 1 stands for scales[o]; scales, bias (or null): (out,)
   floats. What the addresses name must outlive it, and is not to change: the weight is packed. */
static PyObject *py_new_int8_layer(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { VALUES, SCALES, BIAS, CROW, COL, R, C, IN, OUT, RELU, ARGUMENTS };
    long long a[ARGUMENTS];
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a))
        return NULL;
    WordLayer layer = {.values = (char *)a[VALUES], .crow = (int32_t *)a[CROW],
                       .col = (int32_t *)a[COL], .R = a[R], .C = a[C], .in = a[IN], .out = a[OUT],
                       .per_word = 4, .planes = a[C] % 4 != 0, .bias = (void *)a[BIAS],
                       .relu = a[RELU] != 0, .scales = (float *)a[SCALES]};
    const Blocks blocks = {.values = layer.values, .output_step = 1, .input_step = a[R]};
    if (check_word_layer(&layer, layer.values) || check_given("scales", layer.scales))
        return NULL;
    if (layer.in > MOST_INT8_INPUTS) {
        PyErr_Format(PyExc_ValueError, "expected at most %d in_features, so that sums fit 32 bits",
                     MOST_INT8_INPUTS);
        return NULL;
    }
    WordLayer *made = malloc(sizeof *made);
    int32_t *totals = calloc(layer.out, sizeof *totals);
    if (!made || !totals || pack_words(int8_sets.kernels[0], &layer, &blocks, 1)) {
        free(made);
        free(totals);
        return PyErr_NoMemory();
    }
    add_weights(&layer, totals);
    layer.totals = totals;
    *made = layer;
    return PyCapsule_New(made, NULL, free_int8_layer_of);
}

/* int8_forward(instruction_set, threads, x, ldx, y, batch, *layers)
   layers: from new_int8_layer; x (batch, in) and y (batch, out of the last), which is
   written: floats */
static PyObject *py_int8_forward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { SET, THREADS, X, LDX, Y, BATCH, HEAD };
    long long a[HEAD + MAX_LAYERS];
    WordLayer layers[MAX_LAYERS];
    const int n = (int)(nargs - HEAD);
    (void)self;
    if (ints_of_layers(args, nargs, HEAD, 1, a))
        return NULL;
    for (int j = 0; j < n; j++) {
        if (check_given("layer", (void *)a[HEAD + j]))
            return NULL;
        layers[j] = *(const WordLayer *)a[HEAD + j];
        if (j && check_follows(j, layers[j - 1].out, layers[j].in))
            return NULL;
    }
    if (check_word_call(&int8_sets, a) || check_at_least(0, "batch", a[BATCH]) ||
        check_rows("x", (float *)a[X], a[LDX], a[BATCH]) ||
        check_rows("y", (float *)a[Y], layers[n - 1].out, a[BATCH]))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = word_forward(int8_sets.kernels[a[SET]], layers, NULL, n, (void *)a[X], 4 * a[LDX],
                          (void *)a[Y], a[BATCH], (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}

static int add_names(PyObject *m, const char *name, const WordSets *sets)
{
    PyObject *names = PyTuple_New(sets->n);
    for (int i = 0; names && i < sets->n; i++)
        PyTuple_SET_ITEM(names, i, PyUnicode_FromString(sets->kernels[i]->name));
    return names ? PyModule_AddObject(m, name, names) : -1;
}

/* The names of the instruction sets of each type; 0, or -1 with an exception set. */
static int add_word_sets(PyObject *m)
{
    return add_names(m, "BF16_INSTRUCTION_SETS", &bf16_sets) ||
           add_names(m, "INT8_INSTRUCTION_SETS", &int8_sets) ||
           PyModule_AddIntMacro(m, MOST_INT8_INPUTS);
}
