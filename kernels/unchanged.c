/* Whether what a call was prepared from is still there; unchanged.py says what is asked. Every call
   of a layer asks it, which takes the interpreter longer than a small product. */

static PyObject *data_ptr, *numel, *is_contiguous, *version; /* names */

/* Whether tensor.name, or tensor.name() if it is a method, equals `expected`: 1, 0 or -1 */
static int is_still(PyObject *tensor, PyObject *name, int method, PyObject *expected)
{
    PyObject *now = method ? PyObject_CallMethodNoArgs(tensor, name)
                           : PyObject_GetAttr(tensor, name);
    const int equal = now ? PyObject_RichCompareBool(now, expected, Py_EQ) : -1;
    Py_XDECREF(now);
    return equal;
}

/* Of one entry: 1, 0 or -1 */
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
    PyObject *tensor = e[VALUE];
    int held = e[ADDRESS] == Py_None ? 1 : is_still(tensor, data_ptr, 1, e[ADDRESS]);
    if (held == 1 && e[COUNT] != Py_None)
        held = is_still(tensor, numel, 1, e[COUNT]);
    if (held == 1 && e[COUNT] != Py_None)
        held = is_still(tensor, is_contiguous, 1, Py_True);
    if (held == 1 && e[VERSION] != Py_None)
        held = is_still(tensor, version, 0, e[VERSION]);
    return held;
}

/* unchanged(own, entries) */
static PyObject *py_unchanged(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    if (nargs != 2 || !PyDict_Check(args[0]) || !PyTuple_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "expected a dict and a tuple");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); i++) {
        const int held = is_held(args[0], PyTuple_GET_ITEM(args[1], i));
        if (held < 0)
            return NULL;
        if (!held)
            Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

static int add_names_of_tensors(void)
{
    data_ptr = PyUnicode_InternFromString("data_ptr");
    numel = PyUnicode_InternFromString("numel");
    is_contiguous = PyUnicode_InternFromString("is_contiguous");
    version = PyUnicode_InternFromString("_version");
    return data_ptr && numel && is_contiguous && version ? 0 : -1;
}
