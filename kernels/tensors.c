/* What a call asks of tensors, and of the modules that hold them, without the time that the
   interpreter takes for it: more than a small product. Tensors are read by DLPack's C functions,
   version 1 (dmlc.github.io/dlpack), of which these are the parts that are used. */

typedef struct {
    char *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    struct {
        uint32_t major, minor;
    } version;
    void *previous, *allocate, *from_tensor, *to_tensor;
    int (*read)(void *tensor, DLTensor *to); /* -1 with an exception set; may be NULL */
    void *stream;
} DLPackExchangeAPI;

static const DLPackExchangeAPI *dlpack; /* NULL where torch is too old to have it */
static PyObject *data_ptr, *numel, *contiguous, *is_neg, *new_empty, *version; /* names */

static int add_names_of_tensors(void)
{
    data_ptr = PyUnicode_InternFromString("data_ptr");
    numel = PyUnicode_InternFromString("numel");
    contiguous = PyUnicode_InternFromString("is_contiguous");
    is_neg = PyUnicode_InternFromString("is_neg");
    new_empty = PyUnicode_InternFromString("new_empty");
    version = PyUnicode_InternFromString("_version");
    return data_ptr && numel && contiguous && is_neg && new_empty && version ? 0 : -1;
}

/* use_dlpack(capsule): reads tensors by a type's __dlpack_c_exchange_api__ from now on, if it can */
static PyObject *py_use_dlpack(PyObject *self, PyObject *capsule)
{
    static const char name[] = "dlpack_exchange_api";
    const DLPackExchangeAPI *api =
        PyCapsule_IsValid(capsule, name) ? PyCapsule_GetPointer(capsule, name) : NULL;
    (void)self;
    if (api && api->version.major == 1 && api->read)
        dlpack = api;
    Py_RETURN_NONE;
}

/* Whether a tensor's numbers lie one behind the other. */
static int is_contiguous(const DLTensor *t)
{
    int64_t step = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->strides[i] != step)
            return 0;
        step *= t->shape[i];
    }
    return 1;
}

/* Whether `now`, which it takes, equals `expected`: 1, 0 or -1 */
static int is_still(PyObject *now, PyObject *expected)
{
    const int equal = now ? PyObject_RichCompareBool(now, expected, Py_EQ) : -1;
    Py_XDECREF(now);
    return equal;
}

/* Whether a tensor lies where it did, and, unless count is None, so many numbers of it, contiguous:
   1, 0 or -1. One that DLPack cannot read has changed. */
static int lies_there(PyObject *tensor, PyObject *address, PyObject *count)
{
    if (!dlpack) {
        int still = is_still(PyObject_CallMethodNoArgs(tensor, data_ptr), address);
        if (still == 1 && count != Py_None)
            still = is_still(PyObject_CallMethodNoArgs(tensor, numel), count);
        if (still == 1 && count != Py_None)
            still = is_still(PyObject_CallMethodNoArgs(tensor, contiguous), Py_True);
        return still;
    }
    int64_t numbers = 1;
    DLTensor t;
    if (dlpack->read(tensor, &t)) {
        PyErr_Clear();
        return 0;
    }
    for (int i = 0; i < t.ndim; i++)
        numbers *= t.shape[i];
    const int still =
        t.data + t.byte_offset == (char *)PyLong_AsVoidPtr(address) &&
        (count == Py_None || (numbers == PyLong_AsLongLong(count) && is_contiguous(&t)));
    return PyErr_Occurred() ? -1 : still;
}

/* Of one entry of unchanged.py, of a module whose __dict__ is `own`: 1, 0 or -1 */
static int is_held(PyObject *own, PyObject *entry)
{
    enum { GROUP, KEY, VALUE, ADDRESS, COUNT, VERSION, ENTRIES };
    PyObject *e[ENTRIES];
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != ENTRIES) {
        PyErr_SetString(PyExc_TypeError, "expected entries of six");
        return -1;
    }
    for (int i = 0; i < ENTRIES; i++)
        e[i] = PyTuple_GET_ITEM(entry, i);
    PyObject *group = own;
    if (e[GROUP] != Py_None)
        group = PyDict_GetItemWithError(own, e[GROUP]);
    if (!group || !PyDict_Check(group)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "expected a dict");
        return -1;
    }
    PyObject *found = PyDict_GetItemWithError(group, e[KEY]);
    if (!found && PyErr_Occurred())
        return -1;
    if ((found ? found : Py_None) != e[VALUE])
        return 0;
    if (e[ADDRESS] == Py_None)
        return 1;
    const int there = lies_there(e[VALUE], e[ADDRESS], e[COUNT]);
    if (there != 1 || e[VERSION] == Py_None)
        return there;
    return is_still(PyObject_GetAttr(e[VALUE], version), e[VERSION]);
}

/* Of one module, its __dict__ and what it held, which is None where nothing can tell: 1, 0 or -1 */
static int is_as_it_was(PyObject *module)
{
    const int pair = PyTuple_Check(module) && PyTuple_GET_SIZE(module) == 2;
    PyObject *own = pair ? PyTuple_GET_ITEM(module, 0) : NULL;
    PyObject *entries = pair ? PyTuple_GET_ITEM(module, 1) : NULL;
    if (!pair || !PyDict_Check(own) || !(entries == Py_None || PyTuple_Check(entries))) {
        PyErr_SetString(PyExc_TypeError, "expected a dict and a tuple or None for each module");
        return -1;
    }
    int held = entries != Py_None;
    for (Py_ssize_t i = 0; held == 1 && i < PyTuple_GET_SIZE(entries); i++)
        held = is_held(own, PyTuple_GET_ITEM(entries, i));
    return held;
}

/* unchanged(modules): as in unchanged.py */
static PyObject *py_unchanged(PyObject *self, PyObject *modules)
{
    int held = 1;
    (void)self;
    if (!PyTuple_Check(modules)) {
        PyErr_SetString(PyExc_TypeError, "expected a tuple of modules");
        return NULL;
    }
    for (Py_ssize_t m = 0; held == 1 && m < PyTuple_GET_SIZE(modules); m++)
        held = is_as_it_was(PyTuple_GET_ITEM(modules, m));
    return held < 0 ? NULL : PyBool_FromLong(held);
}

/* Whether a tensor is rows (batch, features) of `bits` floating-point numbers on a CPU, each row one
   number behind the other and at a multiple of 4 bytes: 1, 0 or -1; type: that it must be of */
static int is_rows(PyObject *tensor, PyObject *type, long long features, long long bits, DLTensor *t)
{
    enum { CPU = 1, FLOAT = 2, BFLOAT = 4 };
    if (!dlpack || (PyObject *)Py_TYPE(tensor) != type)
        return 0;
    if (dlpack->read(tensor, t)) {
        PyErr_Clear();
        return 0;
    }
    t->data += t->byte_offset;
    if (!t->data || t->device.type != CPU || t->dtype.code != (bits == 16 ? BFLOAT : FLOAT) ||
        t->dtype.bits != bits || t->ndim != 2 || t->shape[0] < 1 || t->shape[1] != features ||
        t->strides[1] != 1 || (uintptr_t)t->data % 4 || t->strides[0] * bits % 32)
        return 0;
    PyObject *negative = PyObject_CallMethodNoArgs(tensor, is_neg); /* of what its memory says */
    Py_XDECREF(negative);
    return negative ? negative == Py_False : -1;
}

/* call(x, plan, instruction_set, threads): y (batch, out), or None unless x is_rows
   plan: type, in, bits, out, entry, *layers; y is written by
   entry(instruction_set, threads, x, ldx, y, batch, *layers) */
static PyObject *py_call(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { X, PLAN, SET, THREADS, ARGUMENTS };
    enum { TYPE, IN, BITS, OUT, ENTRY, LAYERS };
    enum { ADDRESS = 2, LDX, Y, BATCH, HEAD, MOST = HEAD + 10 * MAX_LAYERS };
    const int given = nargs == ARGUMENTS && PyTuple_Check(args[PLAN]);
    const Py_ssize_t n = given ? PyTuple_GET_SIZE(args[PLAN]) - LAYERS : -1;
    (void)self;
    if (n < 0 || n > MOST - HEAD) {
        PyErr_SetString(PyExc_TypeError, "expected a tensor, a plan and two ints");
        return NULL;
    }
    PyObject **plan = PySequence_Fast_ITEMS(args[PLAN]);
    const long long in = PyLong_AsLongLong(plan[IN]), bits = PyLong_AsLongLong(plan[BITS]);
    DLTensor x, y;
    const int rows = PyErr_Occurred() ? -1 : is_rows(args[X], plan[TYPE], in, bits, &x);
    if (rows < 1)
        return rows ? NULL : Py_NewRef(Py_None);
    PyObject *all[MOST], *done = NULL;
    all[0] = args[SET], all[1] = args[THREADS];
    all[ADDRESS] = PyLong_FromVoidPtr(x.data);
    all[LDX] = PyLong_FromLongLong(x.strides[0]);
    all[BATCH] = PyLong_FromLongLong(x.shape[0]);
    PyObject *sizes[] = {args[X], all[BATCH], plan[OUT]};
    PyObject *made = all[BATCH] ? PyObject_VectorcallMethod(new_empty, sizes, 3, NULL) : NULL;
    all[Y] = made && !dlpack->read(made, &y) ? PyLong_FromVoidPtr(y.data + y.byte_offset) : NULL;
    memcpy(all + HEAD, plan + LAYERS, n * sizeof *all);
    if (all[ADDRESS] && all[LDX] && all[Y])
        done = PyObject_Vectorcall(plan[ENTRY], all, HEAD + n, NULL);
    for (int i = ADDRESS; i < HEAD; i++)
        Py_XDECREF(all[i]);
    if (!done)
        Py_CLEAR(made);
    Py_XDECREF(done);
    return made;
}
