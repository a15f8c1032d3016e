/* The entry points for convolutions: they read and check the ints that they are called with. */

/* Every call begins with these; the arguments of its own follow. */
enum {
    INSTRUCTION_SET, THREADS, CHANNELS_LAST, BATCH, CHANNELS, HEIGHT, WIDTH, OUT, OUT_HEIGHT,
    OUT_WIDTH, KERNEL_HEIGHT, KERNEL_WIDTH, STRIDE_Y, STRIDE_X, DILATION_Y, DILATION_X, TOP, LEFT,
    ROWS_OF_BLOCK, COLUMNS_OF_BLOCK, SHAPE_INTS
};

/* 0, or another number with a ValueError set. Any output size will do: beyond the image are zeros.
   What one row of outputs needs must be counted in 32 bits, and so must one plane of an image. */
static int read_shape(const long long *a, Shape *s)
{
    static const char *const names[SHAPE_INTS] = {
        [CHANNELS] = "channels", [HEIGHT] = "height", [WIDTH] = "width", [OUT] = "out_channels",
        [OUT_HEIGHT] = "out_height", [OUT_WIDTH] = "out_width", [KERNEL_HEIGHT] = "kernel height",
        [KERNEL_WIDTH] = "kernel width", [STRIDE_Y] = "stride", [STRIDE_X] = "stride",
        [DILATION_Y] = "dilation", [DILATION_X] = "dilation", [TOP] = "padding",
        [LEFT] = "padding", [ROWS_OF_BLOCK] = "R", [COLUMNS_OF_BLOCK] = "C"};
    if (check_call(a[INSTRUCTION_SET], a[THREADS], a[BATCH]))
        return -1;
    for (int i = CHANNELS; i < SHAPE_INTS; i++) {
        if (check_at_least(i == TOP || i == LEFT ? 0 : 1, names[i], a[i]))
            return -1;
        if (a[i] > INT32_MAX) {
            PyErr_Format(PyExc_ValueError, "expected %s of 32 bits, got %lld", names[i], a[i]);
            return -1;
        }
    }
    *s = (Shape){.batch = a[BATCH], .channels = a[CHANNELS], .height = a[HEIGHT],
                 .width = a[WIDTH], .out = a[OUT], .out_height = a[OUT_HEIGHT],
                 .out_width = a[OUT_WIDTH], .kernel = {a[KERNEL_HEIGHT], a[KERNEL_WIDTH]},
                 .stride = {a[STRIDE_Y], a[STRIDE_X]}, .dilation = {a[DILATION_Y], a[DILATION_X]},
                 .pad = {a[TOP], a[LEFT]}, .channels_last = a[CHANNELS_LAST] != 0, .pool = 1};
    const double rows = 1 + (double)(s->kernel[0] - 1) * s->dilation[0],
                 width = (s->out_width + (double)s->kernel[1] * s->dilation[1]) * s->stride[1],
                 height = (s->out_height + rows) * s->stride[0];
    if (max64(s->channels, s->out) * rows * width > INT32_MAX / 2 ||
        height * width > INT32_MAX / 2 ||
        (double)s->channels * s->kernel[0] * s->kernel[1] > INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "expected images and a kernel of fewer numbers");
        return -1;
    }
    return 0;
}

static int64_t in_features(const Shape *s)
{
    return s->channels * s->kernel[0] * s->kernel[1];
}

static int given(const Shape *s, const char *name, const void *address)
{
    return s->batch ? check_given(name, address) : 0;
}

/* conv_forward(*shape, x, y, values, bias, crow, col, relu, pool); y (batch, out_channels,
   out_height / pool, out_width / pool) is written, the maxima of pool x pool outputs */
static PyObject *py_conv_forward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { X = SHAPE_INTS, Y, VALUES, BIAS, CROW, COL, RELU, POOL, ARGUMENTS };
    long long a[ARGUMENTS];
    Shape s;
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a) || read_shape(a, &s))
        return NULL;
    const Layer l = {.values = (float *)a[VALUES], .bias = (float *)a[BIAS],
                     .crow = (int32_t *)a[CROW], .col = (int32_t *)a[COL], .R = a[ROWS_OF_BLOCK],
                     .C = a[COLUMNS_OF_BLOCK], .in = in_features(&s), .out = s.out,
                     .relu = a[RELU] != 0};
    const float *x = (float *)a[X];
    float *y = (float *)a[Y];
    if (a[POOL] != 1 && a[POOL] != 2) {
        PyErr_Format(PyExc_ValueError, "expected pool 1 or 2, got %lld", a[POOL]);
        return NULL;
    }
    s.pool = (int)a[POOL];
    if (given(&s, "x", x) || given(&s, "y", y) ||
        check_blocks(l.values, l.crow, block_rows(&l) + 1, l.col))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = conv_forward(usable[a[INSTRUCTION_SET]], &s, &l, x, y,
                          (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}

/* conv_grad_input(*shape, grad, dx, slots, values, ccol, rows); dx is written but for pixels that
   a stride passes over, which must be 0 before */
static PyObject *py_conv_grad_input(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { GRAD = SHAPE_INTS, DX, SLOTS, VALUES, CCOL, ROWS, ARGUMENTS };
    long long a[ARGUMENTS];
    Shape s;
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a) || read_shape(a, &s))
        return NULL;
    const Layer transposed = {.values = (float *)a[VALUES], .crow = (int32_t *)a[CCOL],
                              .col = (int32_t *)a[ROWS], .R = a[COLUMNS_OF_BLOCK],
                              .C = a[ROWS_OF_BLOCK], .in = s.out, .out = in_features(&s)};
    const int32_t *slots = (int32_t *)a[SLOTS];
    const float *grad = (float *)a[GRAD];
    float *dx = (float *)a[DX];
    if (given(&s, "grad", grad) || given(&s, "dx", dx) ||
        check_blocks(transposed.values, transposed.crow, block_rows(&transposed) + 1,
                     transposed.col) ||
        (kept_weights(&transposed) && check_given("slots", slots)))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = conv_grad_input(usable[a[INSTRUCTION_SET]], &s, &transposed, slots, grad, dx,
                             (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}

/* conv_grad_weight(*shape, grad, x, values, crow, col) adds to values (nnz, C, R) */
static PyObject *py_conv_grad_weight(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { GRAD = SHAPE_INTS, X, VALUES, CROW, COL, ARGUMENTS };
    long long a[ARGUMENTS];
    Shape s;
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a) || read_shape(a, &s))
        return NULL;
    const Gradient g = {.grad = (float *)a[GRAD], .x = (float *)a[X], .values = (float *)a[VALUES],
                        .crow = (int32_t *)a[CROW], .col = (int32_t *)a[COL],
                        .R = a[ROWS_OF_BLOCK], .C = a[COLUMNS_OF_BLOCK], .in = in_features(&s),
                        .out = s.out};
    if (given(&s, "grad", g.grad) || given(&s, "x", g.x) ||
        check_blocks(g.values, g.crow, ceil_div(g.out, g.R) + 1, g.col))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = conv_grad_weight(usable[a[INSTRUCTION_SET]], &s, &g,
                              (int)min64(a[THREADS], MAX_THREADS));
    Py_END_ALLOW_THREADS;
    return none_or_no_memory(failed);
}
