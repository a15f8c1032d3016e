/* The index arrays of a block-sparse weight: whether kernels may trust them, and their transpose.
   crow (block_rows + 1,), col (nnz,), rows (nnz,), slots (nnz,), ccol (block_cols + 1,) */

/* What is wrong with index arrays. */
typedef enum { VALID, CROW_FALLS, COL_OUTSIDE, COL_FALLS } Fault;

/* For COL_FALLS, *at is the first n with col[n] <= col[n - 1] in one block row. */
static Fault find_fault(const int32_t *crow, int64_t block_rows, const int32_t *col, int64_t nnz,
                        int64_t block_cols, int64_t *at)
{
    int falls = 0, outside = 0;
    for (int64_t i = 0; i < block_rows; i++)
        falls |= crow[i + 1] < crow[i];
    if (crow[0] != 0 || crow[block_rows] != nnz || falls)
        return CROW_FALLS;
    for (int64_t n = 0; n < nnz; n++)
        outside |= (col[n] < 0) | (col[n] >= block_cols);
    if (outside)
        return COL_OUTSIDE;
    for (int64_t i = 0; i < block_rows; i++)
        for (int64_t n = crow[i] + 1; n < crow[i + 1]; n++)
            if (col[n] <= col[n - 1]) {
                *at = n;
                return COL_FALLS;
            }
    return VALID;
}

/* A counting sort by column, stable: ccol counts, then says where the next block of a column goes,
   which in the end is where the next column starts. */
static void transpose_indices(const int32_t *crow, int64_t block_rows, const int32_t *col,
                              int64_t nnz, int64_t block_cols, int32_t *ccol, int32_t *rows,
                              int32_t *slots)
{
    memset(ccol, 0, (block_cols + 1) * sizeof *ccol);
    for (int64_t n = 0; n < nnz; n++)
        ccol[col[n] + 1]++;
    for (int64_t c = 0; c < block_cols; c++)
        ccol[c + 1] += ccol[c];
    for (int64_t i = 0; i < block_rows; i++)
        for (int64_t n = crow[i]; n < crow[i + 1]; n++) {
            const int32_t t = ccol[col[n]]++;
            rows[t] = (int32_t)i;
            slots[t] = (int32_t)n;
        }
    memmove(ccol + 1, ccol, block_cols * sizeof *ccol);
    ccol[0] = 0;
}

/* check_indices(crow, crow_length, col, nnz, block_cols): None, or a ValueError unless crow rises
   from 0 to nnz and col, from 0 to block_cols - 1, rises strictly within a block row */
static PyObject *py_check_indices(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { CROW, CROW_LENGTH, COL, NNZ, BLOCK_COLS, ARGUMENTS };
    long long a[ARGUMENTS];
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a))
        return NULL;
    const int32_t *crow = (int32_t *)a[CROW], *col = (int32_t *)a[COL];
    if (check_given("crow_indices", crow) || check_at_least(1, "crow_length", a[CROW_LENGTH]) ||
        check_at_least(0, "nnz", a[NNZ]) || (a[NNZ] && check_given("col_indices", col)))
        return NULL;
    int64_t at = 0;
    switch (find_fault(crow, a[CROW_LENGTH] - 1, col, a[NNZ], a[BLOCK_COLS], &at)) {
    case VALID: Py_RETURN_NONE;
    case CROW_FALLS: {
        PyObject *list = PyList_New(a[CROW_LENGTH]);
        for (Py_ssize_t i = 0; list && i < a[CROW_LENGTH]; i++)
            PyList_SET_ITEM(list, i, PyLong_FromLong(crow[i]));
        if (list)
            PyErr_Format(PyExc_ValueError, "expected crow_indices to rise from 0 to %lld, got %R",
                         a[NNZ], list);
        Py_XDECREF(list);
        break;
    }
    case COL_OUTSIDE: {
        int32_t least = col[0], most = col[0];
        for (int64_t n = 1; n < a[NNZ]; n++) {
            least = col[n] < least ? col[n] : least;
            most = col[n] > most ? col[n] : most;
        }
        PyErr_Format(PyExc_ValueError, "expected col_indices from 0 to %lld, got %d to %d",
                     a[BLOCK_COLS] - 1, least, most);
        break;
    }
    case COL_FALLS:
        PyErr_Format(PyExc_ValueError,
                     "expected col_indices to rise strictly within a block row, "
                     "got %d then %d at %lld",
                     col[at - 1], col[at], (long long)at);
    }
    return NULL;
}

/* transpose_indices(crow, block_rows, col, nnz, block_cols, ccol, rows, slots): of valid indices;
   ccol (block_cols + 1,), rows (nnz,) and slots (nnz,) are written, as Pattern has them */
static PyObject *py_transpose_indices(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { CROW, BLOCK_ROWS, COL, NNZ, BLOCK_COLS, CCOL, ROWS, SLOTS, ARGUMENTS };
    long long a[ARGUMENTS];
    (void)self;
    if (ints(args, nargs, ARGUMENTS, a))
        return NULL;
    const int32_t *crow = (int32_t *)a[CROW], *col = (int32_t *)a[COL];
    int32_t *ccol = (int32_t *)a[CCOL], *rows = (int32_t *)a[ROWS], *slots = (int32_t *)a[SLOTS];
    if (check_given("crow_indices", crow) || check_given("ccol_indices", ccol) ||
        check_at_least(0, "block_rows", a[BLOCK_ROWS]) || check_at_least(0, "nnz", a[NNZ]) ||
        check_at_least(0, "block_cols", a[BLOCK_COLS]) ||
        (a[NNZ] && (check_given("col_indices", col) || check_given("rows", rows) ||
                    check_given("slots", slots))))
        return NULL;
    transpose_indices(crow, a[BLOCK_ROWS], col, a[NNZ], a[BLOCK_COLS], ccol, rows, slots);
    Py_RETURN_NONE;
}
