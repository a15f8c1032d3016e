/* What a call does: passes layers over tiles of the batch, on threads. Included after the kernels
   of every instruction set. */

/* Room for at least `floats`, or NULL; aligned_alloc takes whole multiples of the alignment. */
static float *allocate(int64_t floats)
{
    return aligned_alloc(64, (floats / 16 + 1) * 64);
}

/* A thread is worth starting for this many multiply-adds, 5 to 10 us. */
enum { WORTH_A_THREAD = 1 << 18 };

/* How the batch is cut into tiles, which pass through the layers one after the other. */
enum {
    TILE = 64,             /* rows at most, where not all of it is machine code */
    WIDE_PANELS = 4,       /* panels that share a load of a weight */
    CODE_PANELS = 16,      /* panels that share a piece of code in the first cache */
    LONG_CODE_PANELS = 32, /* the same for layers so long that a piece takes fewer inputs */
    GATHERED = 16,         /* multiply-adds that take as long as one whose input is gathered */
    MUCH_CODE = 1 << 19,   /* bytes that crowd the second cache: tiles are then of many panels, too */
    SHARED_CODE = 1 << 16, /* bytes for each row that a thread takes, from which on threads share a
                              tile, each with outputs, and so with code, of its own; ... */
    HUGE_CODE = 1 << 23,   /* ... or bytes in all, which would crowd the last cache */
    PAGE = 4096 / sizeof(float),
};

typedef struct {
    const Kernels *kernels;
    const Layer *layers;
    const Code **codes; /* of each layer, or NULL */
    int n, threads;     /* layers; threads for one layer of one tile */
    const float *x;
    float *y;
    int64_t ldx, batch, tile; /* tile: rows */
    int pad;                  /* whether panels come by 1, 2 or fours, as `wide` wants them */
    int64_t part;             /* floats of one scratch buffer */
    float *scratch;           /* (workers, 2, part) */
} Forward;

static int is_tall(const Layer *l) { return l->R % 8 == 0; }

/* Whether layer j is taken in panels, not in rows. */
static int takes_panels(const Forward *f, int j)
{
    return f->batch > 1 && (f->codes[j] || !is_tall(&f->layers[j]));
}

static int64_t panels_of(const Kernels *k, int64_t rows, int pad)
{
    const int64_t panels = ceil_div(rows, k->lanes);
    return pad && panels > 2 ? ceil_div(panels, WIDE_PANELS) * WIDE_PANELS : panels;
}

/* Floats from panel to panel, and from row to row of scratch. At a multiple of a page they would
   meet in few places of the caches. */
static int64_t panel_stride(const Kernels *k, int64_t features)
{
    return (features + (features % 64 == 0 ? 5 : 0)) * k->lanes;
}

static int64_t row_stride(int64_t features)
{
    return features + (features % PAGE == 0 ? 16 : 0);
}

/* One layer on one tile, cut into ranges of outputs. */
typedef struct {
    const Kernels *kernels;
    const Layer *layer;
    const Code *code;
    const float *x;
    float *y;
    int64_t ldx, ldy, rows, panels; /* panels: 0 where x and y are rows */
    int64_t parts, range;           /* outputs, block rows or groups; how many in a range */
} Step;

static void step_range(void *arg, int64_t i, int worker)
{
    const Step *s = arg;
    const Layer *l = s->layer;
    const Kernels *k = s->kernels;
    const int64_t begin = i * s->range, end = min64(s->parts, begin + s->range);
    (void)worker;
    if (s->code)
        k->run_code(s->code, l, begin, end, s->x, s->ldx, s->y, s->ldy, s->panels);
    else if (is_tall(l))
        for (int64_t m = 0; m < s->rows; m += TILE)
            (l->R % 16 ? k->tall8 : k->tall16)(l, begin, end, s->x + m * s->ldx, s->ldx,
                                               s->y + m * s->ldy, s->ldy, min64(TILE, s->rows - m));
    else if (s->panels == 0)
        k->single(l, begin, end, s->x, s->y);
    else
        for (int64_t p = 0; p < s->panels; p += WIDE_PANELS)
            k->wide(l, begin, end, s->x + p * s->ldx, s->ldx, s->y + p * s->ldy, s->ldy,
                    min64(WIDE_PANELS, s->panels - p));
}

/* Rows of the batch into panels or back, cut into ranges of features. */
typedef struct {
    const Kernels *kernels;
    const float *from;
    float *to;
    int64_t ldrows, ldpanels, rows, panels, features, range;
    int into_panels;
} Turn;

static void turn_range(void *arg, int64_t i, int worker)
{
    const Turn *t = arg;
    const Kernels *k = t->kernels;
    const int64_t L = k->lanes, begin = i * t->range, n = min64(t->features - begin, t->range);
    (void)worker;
    for (int64_t p = 0; p < t->panels; p++) {
        const int64_t row = p * L * t->ldrows + begin, panel = p * t->ldpanels + begin * L;
        const int64_t rows = max64(0, min64(L, t->rows - p * L));
        if (t->into_panels)
            k->transpose(t->from + row, t->ldrows, rows, n, t->to + panel, L, L);
        else if (rows)
            k->transpose(t->from + panel, L, n, rows, t->to + row, t->ldrows, n);
    }
}

/* Rows into rows further apart, cut into ranges of rows. */
typedef struct {
    const float *from;
    float *to;
    int64_t ldfrom, ldto, rows, features, range;
} Copy;

static void copy_range(void *arg, int64_t i, int worker)
{
    const Copy *c = arg;
    (void)worker;
    for (int64_t m = i * c->range; m < min64(c->rows, (i + 1) * c->range); m++)
        memcpy(c->to + m * c->ldto, c->from + m * c->ldfrom, c->features * sizeof(float));
}

/* Brings x (rows, in) into cache. Tall blocks read it in no order, in which memory is slow; a load
   of each line in order is fast, and faster than prefetches. */
static void touch(const float *x, int64_t ldx, int64_t rows, int64_t in)
{
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < in; k += 16)
            (void)*(const volatile float *)(x + m * ldx + k);
}

/* The activations of a tile: rows or panels of x, a layer's input or already its output. They lie
   in one of two scratch buffers, `other`, and the next ones go into `spare`. */
typedef struct {
    const float *x;
    int64_t ldx, rows, panels;
    int in_panels;
    float *spare, *other;
} Activations;

/* How many of `all` parts a task takes, `least` or a multiple of it: all of them on one thread, else
   a fourth of a thread's to a half, by which the thread that has most has least. */
static int64_t range_of(const Forward *f, int64_t all, int64_t least)
{
    const int64_t units = ceil_div(all, least), threads = f->threads;
    int64_t best = ceil_div(units, threads > 1 ? 4 * threads : 1), fewest = INT64_MAX;
    for (int64_t range = best; range * 2 * threads <= units; range++) {
        const int64_t most = ceil_div(ceil_div(units, range), threads) * range; /* of a thread */
        if (most < fewest)
            best = range, fewest = most;
    }
    return best * least;
}

/* x is now what was written to `to`, the spare buffer or the result. */
static void move_on(Activations *a, float *to, int64_t ldx)
{
    a->x = to, a->ldx = ldx, a->spare = a->other, a->other = to;
}

/* Puts the activations, of so many features, into panels, or into rows; in a buffer, or in y. */
static void turn(const Forward *f, Activations *a, int64_t features, float *y)
{
    const int into_panels = !a->in_panels;
    const int64_t ldpanels = into_panels ? panel_stride(f->kernels, features) : a->ldx;
    const int64_t ldrows = into_panels ? a->ldx : y ? features : row_stride(features);
    Turn t = {.kernels = f->kernels, .from = a->x, .to = y ? y : a->spare, .ldrows = ldrows,
              .ldpanels = ldpanels, .rows = a->rows, .panels = a->panels, .features = features,
              .range = range_of(f, features, 64), .into_panels = into_panels};
    parallel_for(f->threads, ceil_div(features, t.range), turn_range, &t);
    move_on(a, t.to, into_panels ? ldpanels : ldrows);
    a->in_panels = into_panels;
}

/* Brings the batch into cache as tall blocks want it: in rows that do not meet in it. */
static void bring_rows(const Forward *f, Activations *a, int64_t in)
{
    if (a->rows == 1 || a->ldx % PAGE) {
        touch(a->x, a->ldx, a->rows, in);
        return;
    }
    Copy c = {.from = a->x, .to = a->spare, .ldfrom = a->ldx, .ldto = row_stride(in),
              .rows = a->rows, .features = in, .range = range_of(f, a->rows, 1)};
    parallel_for(f->threads, ceil_div(a->rows, c.range), copy_range, &c);
    move_on(a, c.to, c.ldto);
}

/* Rows i * tile .. of the batch through all layers. */
static void forward_tile(void *arg, int64_t i, int worker)
{
    const Forward *f = arg;
    const int64_t begin = i * f->tile, rows = min64(f->tile, f->batch - begin);
    float *scratch = f->scratch + 2 * f->part * worker;
    float *y = f->y + begin * f->layers[f->n - 1].out;
    Activations a = {.x = f->x + begin * f->ldx, .ldx = f->ldx, .rows = rows,
                     .panels = panels_of(f->kernels, rows, f->pad), .spare = scratch,
                     .other = scratch + f->part};
    for (int j = 0; j < f->n; j++) {
        const Layer *l = &f->layers[j];
        const int wide = takes_panels(f, j), last = j == f->n - 1;
        if (wide != a.in_panels)
            turn(f, &a, l->in, NULL);
        else if (j == 0 && is_tall(l))
            bring_rows(f, &a, l->in);
        Step s = {.kernels = f->kernels, .layer = l, .code = f->codes[j], .x = a.x, .ldx = a.ldx,
                  .y = last && !wide ? y : a.spare, .rows = rows, .panels = wide ? a.panels : 0};
        s.ldy = wide ? panel_stride(f->kernels, l->out) : last ? l->out : row_stride(l->out);
        s.parts = s.code ? s.code->groups : is_tall(l) ? block_rows(l) : l->out;
        s.range = range_of(f, s.parts, 1);
        parallel_for(f->threads, ceil_div(s.parts, s.range), step_range, &s);
        move_on(&a, s.y, s.ldy);
    }
    if (a.in_panels)
        turn(f, &a, f->layers[f->n - 1].out, y);
}

/* From which batch on code pays: where many weights are read for it, from a larger one; and for tall
   blocks from a larger one the more inputs side by side they have, which rows are read well for. */
static int64_t least_batch(const Layer *l, int64_t kept)
{
    enum { MANY = 1 << 20 };
    if (!is_tall(l))
        return kept < MANY ? 32 : 64;
    return l->C <= (l->R % 16 ? 8 : 1) ? 64 * l->C : INT64_MAX;
}

/* The code of a layer, or NULL where there is none or it does not pay: the batch is small, or too
   few weights share a load of x. */
static const Code *find_code(const Kernels *k, const Layer *l, int64_t batch)
{
    enum { ONE_IN = 33 };
    const int64_t kept = kept_weights(l);
    const int pays = ONE_IN * kept >= l->in * l->out && batch >= least_batch(l, kept);
    return k->code_of && l->program && pays ? k->code_of(l->program) : NULL;
}

/* Cuts the batch into tiles, of which `threads` run at a time, or one on all threads. What is no
   code adds up in an order that depends on the rows of a tile: these then depend on the batch only,
   not on the number of threads. */
static int plan_forward(Forward *f, int threads)
{
    int64_t work = 0, widest = f->layers[0].in, longest = 0, code = 0;
    int any_wide = 0, all_code = 1;
    for (int j = 0; j < f->n; j++) {
        const Layer *l = &f->layers[j];
        f->codes[j] = find_code(f->kernels, l, f->batch);
        const int gathers = f->batch == 1 && l->C == 1 && !is_tall(l);
        work += (gathers ? GATHERED : f->batch) * kept_weights(l);
        widest = max64(widest, l->out);
        any_wide |= takes_panels(f, j);
        all_code &= f->codes[j] != NULL;
        code += f->codes[j] ? (int64_t)f->codes[j]->used : 0;
        longest = max64(longest, f->codes[j] ? l->in : 0);
    }
    const int64_t L = f->kernels->lanes;
    threads = threads_now((int)max64(1, min64(threads, work / WORTH_A_THREAD)));
    f->pad = !all_code;
    const int few = f->batch <= 2 * TILE; /* rows: half a tile each, so that threads find some */
    f->tile = any_wide ? (few ? WIDE_PANELS / 2 : WIDE_PANELS) * L
                       : ceil_div(f->batch, ceil_div(f->batch, few ? TILE / 2 : TILE));
    const int64_t bearable = min64(SHARED_CODE * f->batch / threads, HUGE_CODE);
    const int shares = threads > 1 && code > bearable;
    if (all_code || code > MUCH_CODE) {
        int64_t panels = shares && longest > LONG ? LONG_CODE_PANELS : CODE_PANELS;
        if (!shares)
            panels = min64(panels, ceil_div(ceil_div(f->batch, L), threads));
        f->tile = L * (all_code ? panels : ceil_div(panels, WIDE_PANELS) * WIDE_PANELS);
    }
    f->tile = min64(f->tile, f->batch);
    const int across = shares || ceil_div(f->batch, f->tile) < threads ? 1 : threads;
    f->threads = threads / across;
    f->part = max64(panels_of(f->kernels, f->tile, f->pad) * (widest + 5) * L,
                    f->tile * (widest + 16));
    f->part = ceil_div(f->part, 16) * 16;
    return across;
}

/* 0, or -1 if there is no memory for the scratch. */
static int forward(const Kernels *k, const Layer *layers, int n, const float *x, int64_t ldx,
                   float *y, int64_t batch, int threads)
{
    const Code *codes[MAX_LAYERS];
    Forward f = {.kernels = k, .layers = layers, .codes = codes, .n = n, .x = x, .y = y,
                 .ldx = ldx, .batch = batch};
    if (batch == 0)
        return 0;
    const int across = plan_forward(&f, threads);
    f.scratch = allocate(across * 2 * f.part);
    if (!f.scratch)
        return -1;
    parallel_for(across, ceil_div(batch, f.tile), forward_tile, &f);
    free(f.scratch);
    return 0;
}

/* grad (batch, out), values (nnz, C, R) -> dx (batch, in): the forward pass of the transposed
   weight, whose blocks are copied in its order. slots, ccol, rows: of Pattern. */
typedef struct {
    const Kernels *kernels;
    const float *values;
    const int32_t *slots;
    float *packed;
    int64_t R, C, nnz, range;
} Pack;

static void pack_range(void *arg, int64_t i, int worker)
{
    const Pack *p = arg;
    const int64_t size = p->R * p->C;
    (void)worker;
    for (int64_t t = i * p->range; t < min64(p->nnz, (i + 1) * p->range); t++) {
        const float *block = p->values + p->slots[t] * size;
        if (size == 1)
            p->packed[t] = *block;
        else
            p->kernels->transpose(block, p->R, p->C, p->R, p->packed + t * size, p->C, p->C);
    }
}

static int grad_input(const Kernels *k, const Layer *transposed, const int32_t *slots,
                      const float *grad, int64_t ldg, float *dx, int64_t batch, int threads)
{
    Layer l = *transposed;
    if (find_code(k, &l, batch))
        return forward(k, &l, 1, grad, ldg, dx, batch, threads); /* which reads values by slots */
    l.program = NULL;
    const int64_t nnz = l.crow[block_rows(&l)], size = l.R * l.C;
    float *packed = allocate(nnz * size);
    if (!packed)
        return -1;
    Pack pack = {.kernels = k, .values = l.values, .slots = slots, .packed = packed, .R = l.C,
                 .C = l.R, .nnz = nnz, .range = ceil_div(1 << 14, size)};
    const int packers = nnz * size < WORTH_A_THREAD ? 1 : threads_now(threads);
    parallel_for(packers, ceil_div(nnz, pack.range), pack_range, &pack);
    l.values = packed;
    const int failed = forward(k, &l, 1, grad, ldg, dx, batch, threads);
    free(packed);
    return failed;
}

/* The weight gradient. Wide blocks: a panel of the batch is transposed, then its dot products
   taken, and the panels are added up in order. */
typedef struct {
    const Kernels *kernels;
    Gradient g;
    float *grad, *x; /* the panel, transposed */
    int64_t begin, rows, lanes, range;
} Sddmm;

static void sddmm_transpose(void *arg, int64_t i, int worker)
{
    const Sddmm *s = arg;
    const Gradient *g = &s->g;
    const int64_t begin = i * s->range, grads = min64(g->out, begin + s->range) - begin,
                  inputs = min64(g->in, begin + s->range) - begin;
    (void)worker;
    if (grads > 0)
        s->kernels->transpose(g->grad + s->begin * g->ldg + begin, g->ldg, s->rows, grads,
                              s->grad + begin * s->lanes, s->lanes, s->lanes);
    if (inputs > 0)
        s->kernels->transpose(g->x + s->begin * g->ldx + begin, g->ldx, s->rows, inputs,
                              s->x + begin * s->lanes, s->lanes, s->lanes);
}

static void sddmm_range(void *arg, int64_t i, int worker)
{
    const Sddmm *s = arg;
    const Gradient *g = &s->g;
    const int64_t begin = i * s->range, end = begin + s->range;
    (void)worker;
    if (g->R % 8)
        s->kernels->sddmm_wide(g, begin, min64(g->out, end), s->grad, s->x, s->lanes,
                               s->begin == 0);
    else
        (g->R % 16 ? s->kernels->sddmm_tall8 : s->kernels->sddmm_tall16)(
            g, begin, min64(ceil_div(g->out, g->R), end));
}

static int sddmm(const Kernels *k, const Gradient *g, int threads)
{
    Sddmm s = {.kernels = k, .g = *g};
    const int64_t rows = ceil_div(g->out, g->R), weights = g->crow[rows] * g->R * g->C;
    if (g->batch == 0)
        for (int64_t n = 0; n < weights; n++)
            g->values[n] = 0;
    threads = threads_now((int)max64(1, min64(threads, weights * g->batch / WORTH_A_THREAD)));
    if (g->R % 8 == 0) {
        s.range = 1;
        parallel_for(threads, rows, sddmm_range, &s);
        return 0;
    }
    s.lanes = k->lanes;
    while (s.lanes < 8 * k->lanes && s.lanes < g->batch)
        s.lanes *= 2;
    s.grad = allocate((g->out + g->in) * s.lanes);
    if (!s.grad)
        return -1;
    s.x = s.grad + g->out * s.lanes;
    s.range = 64; /* features that one transposes, outputs that one takes */
    for (; s.begin < g->batch; s.begin += s.lanes) {
        s.rows = min64(s.lanes, g->batch - s.begin);
        parallel_for(threads, ceil_div(max64(g->in, g->out), s.range), sddmm_transpose, &s);
        parallel_for(threads, ceil_div(g->out, s.range), sddmm_range, &s);
    }
    free(s.grad);
    return 0;
}
