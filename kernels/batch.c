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
    TILE_PANELS = 4,       /* panels of a tile that is not all machine code */
    CODE_PANELS = 16,      /* panels that share a piece of code in the first cache */
    LONG_CODE_PANELS = 32, /* the same for layers so long that a piece takes fewer inputs */
    FEW_PANELS = 8,        /* in all: tiles are then of half as many, so that threads find some */
    GATHERED = 16,         /* multiply-adds that take as long as one whose input is gathered */
    MUCH_CODE = 1 << 19,   /* bytes that crowd the second cache: tiles are then of many panels, too */
    SHARED_CODE = 1 << 16, /* bytes for each row that a thread takes, from which on threads share a
                              tile, each with outputs, and so with code, of its own; ... */
    HUGE_CODE = 1 << 23,   /* ... or bytes in all, which would crowd the last cache */
};

/* The batch is panels, in tiles that differ by one unit at most, and a rest of few rows. */
typedef struct {
    const Kernels *kernels;
    const Layer *layers;
    const Code **codes; /* of each layer, or NULL */
    int n, threads;     /* layers; threads for one layer of one tile */
    const float *x;
    float *y;
    int64_t ldx, batch;
    int64_t panels, tiles;
    int64_t unit, units; /* panels that are not cut apart, and how many such */
    int64_t part;        /* floats of one scratch buffer */
    float *scratch;      /* (workers, 2, part) */
} Forward;

static int is_tall(const Layer *l) { return l->R % 4 == 0; }

/* Whether a layer is taken in rows: one row alone is, and tall blocks are in the rest. Where there
   are registers for 14 rows, blocks that a vector of x is read well for pay without a transpose,
   unless x does not stay in the second cache or its rows meet in the first. */
static int takes_rows(const Forward *f, const Layer *l, int is_rest, int64_t rows)
{
    enum { PAGE = 4096 / sizeof(float) };
    if (is_rest)
        return rows == 1 || is_tall(l);
    return f->kernels->lanes == 16 && l->R % 16 == 0 && l->C >= 4 && l->in % PAGE != 0 &&
           TILE_PANELS * 16 * l->in <= CACHED;
}

/* The row of the batch at which tile i begins; the rest, if there is one, is the last tile. */
static int64_t first_row(const Forward *f, int64_t i)
{
    if (i > f->tiles)
        return f->batch;
    const int64_t panel = f->tiles ? f->units * i / f->tiles * f->unit : 0;
    return min64(f->batch, min64(f->panels, panel) * f->kernels->lanes);
}

/* Floats from panel to panel. At a multiple of a page they would meet in few places of the caches. */
static int64_t panel_stride(const Kernels *k, int64_t features)
{
    return (features + (features % 64 == 0 ? 5 : 0)) * k->lanes;
}

/* One layer on one tile, cut into ranges of outputs. */
typedef struct {
    const Kernels *kernels;
    const Layer *layer;
    const Code *code;
    const float *x;
    float *y;
    float *result; /* NULL, or the rows (rows, out) that y goes into from its panels */
    int64_t ldx, ldy, rows, panels; /* panels: 0 where x and y are rows */
    int64_t parts, range;           /* outputs, block rows or groups; how many in a range */
} Step;

/* Puts outputs begin .. end into rows. */
static void finish(const Step *s, int64_t begin, int64_t end)
{
    const int64_t L = s->kernels->lanes, out = s->layer->out;
    end = min64(end, out);
    for (int64_t p = 0; s->result && p < s->panels; p++)
        s->kernels->transpose(s->y + p * s->ldy + begin * L, L, end - begin,
                              min64(L, s->rows - p * L), s->result + p * L * out + begin, out,
                              end - begin);
}

static void step_range(void *arg, int64_t i, int worker)
{
    const Step *s = arg;
    const Layer *l = s->layer;
    const Kernels *k = s->kernels;
    const int64_t begin = i * s->range, end = min64(s->parts, begin + s->range);
    (void)worker;
    if (s->code) {
        k->run_code(s->code, l, begin, end, s->x, s->ldx, s->y, s->ldy, s->panels);
        finish(s, begin * GROUP, end * GROUP);
    } else if (s->panels) {
        /* so many block rows that their outputs are still in the first cache */
        const int64_t few = s->panels * k->lanes * l->in <= CACHED ? max64(1, 64 / l->R) : s->range;
        for (int64_t n = begin; n < end; n += few) {
            const int64_t last = min64(end, n + few);
            k->panels(l, n, last, s->x, s->ldx, s->y, s->ldy, s->panels);
            finish(s, n * l->R, last * l->R);
        }
    } else if (is_tall(l))
        (l->R % 8 ? k->tall4 : l->R % 16 ? k->tall8 : k->tall16)(l, begin, end, s->x, s->ldx, s->y,
                                                                 s->ldy, s->rows);
    else
        k->single(l, begin, end, s->x, s->y);
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
        const int64_t rows = min64(L, t->rows - p * L);
        if (t->into_panels)
            k->transpose(t->from + row, t->ldrows, rows, n, t->to + panel, L, L);
        else
            k->transpose(t->from + panel, L, n, rows, t->to + row, t->ldrows, n);
    }
}

/* Brings x (rows, in) into cache. Tall blocks read it in no order, in which memory is slow; a load
   of each line in order is fast, and faster than prefetches. */
static void touch(const float *x, int64_t ldx, int64_t rows, int64_t in)
{
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < in; k += LINE_FLOATS)
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

/* x is now what was written to the spare buffer. */
static void move_on(Activations *a, int64_t ldx)
{
    float *written = a->spare;
    a->spare = a->other, a->other = written, a->x = written, a->ldx = ldx;
}

/* Puts the activations, of so many features, into panels, or into rows. */
static void turn(const Forward *f, Activations *a, int64_t features)
{
    a->in_panels = !a->in_panels;
    const int64_t ld = a->in_panels ? panel_stride(f->kernels, features) : features;
    Turn t = {.kernels = f->kernels, .from = a->x, .to = a->spare, .rows = a->rows,
              .ldrows = a->in_panels ? a->ldx : ld, .ldpanels = a->in_panels ? ld : a->ldx,
              .panels = a->panels, .features = features, .range = range_of(f, features, 64),
              .into_panels = a->in_panels};
    parallel_for(f->threads, ceil_div(features, t.range), turn_range, &t);
    move_on(a, ld);
}

/* Tile i of the batch through all layers. */
static void forward_tile(void *arg, int64_t i, int worker)
{
    const Forward *f = arg;
    const int64_t begin = first_row(f, i), rows = first_row(f, i + 1) - begin;
    const int is_rest = i == f->tiles;
    float *scratch = f->scratch + 2 * f->part * worker;
    float *y = f->y + begin * f->layers[f->n - 1].out;
    Activations a = {.x = f->x + begin * f->ldx, .ldx = f->ldx, .rows = rows,
                     .panels = ceil_div(rows, f->kernels->lanes), .spare = scratch,
                     .other = scratch + f->part};
    for (int j = 0; j < f->n; j++) {
        const Layer *l = &f->layers[j];
        const int stay = a.in_panels && !is_rest; /* to turn them would cost more than rows gain */
        const int in_panels = stay || !takes_rows(f, l, is_rest, rows);
        float *const result = j == f->n - 1 ? y : NULL;
        if (in_panels != a.in_panels)
            turn(f, &a, l->in);
        else if (j == 0 && is_tall(l))
            touch(a.x, a.ldx, rows, l->in);
        Step s = {.kernels = f->kernels, .layer = l, .x = a.x, .ldx = a.ldx, .rows = rows,
                  .y = in_panels || !result ? a.spare : result, .ldy = l->out, .parts = l->out};
        if (in_panels) {
            s.code = f->codes[j], s.panels = a.panels, s.result = result;
            s.ldy = panel_stride(f->kernels, l->out);
        }
        if (in_panels || is_tall(l))
            s.parts = s.code ? s.code->groups : block_rows(l);
        s.range = range_of(f, s.parts, 1);
        parallel_for(f->threads, ceil_div(s.parts, s.range), step_range, &s);
        move_on(&a, s.ldy);
    }
}

/* The code of a layer, or NULL where there is none or it does not pay: blocks are so high that
   outputs share a load of x without it, the batch is small, more so where many weights are read for
   it, or too few weights share a load of x. */
static const Code *find_code(const Kernels *k, const Layer *l, int64_t batch)
{
    enum { SHARING = 4, LEAST_BATCH = 32, MANY = 1 << 20, ONE_IN = 33 };
    const int64_t kept = kept_weights(l);
    const int pays = l->R < SHARING && batch >= (kept < MANY ? LEAST_BATCH : 2 * LEAST_BATCH) &&
                     ONE_IN * kept >= l->in * l->out;
    return k->code_of && l->program && pays ? k->code_of(l->program) : NULL;
}

/* What codes a call runs. */
typedef struct {
    int64_t bytes, longest; /* in all; the most inputs of a layer that has one */
    int all, shared;        /* whether every layer has one; whether threads share tiles for them */
} Codes;

/* The panels of a tile. What is no code adds up in an order that depends on them: they then depend
   on the batch only, not on the number of threads. */
static int64_t panels_of_tile(const Forward *f, const Codes *c, int threads)
{
    if (!c->all && c->bytes <= MUCH_CODE)
        return f->panels <= FEW_PANELS ? TILE_PANELS / 2 : TILE_PANELS;
    if (c->shared)
        return c->longest > LONG ? LONG_CODE_PANELS : CODE_PANELS;
    return min64(CODE_PANELS, ceil_div(f->panels, threads));
}

/* Cuts the batch into tiles, of which some, as is returned, run at a time, or one on all threads. */
static int plan_forward(Forward *f, int threads)
{
    const int64_t L = f->kernels->lanes;
    int64_t work = 0, widest = f->layers[0].in, least = L + 1;
    Codes c = {.all = 1};
    for (int j = 0; j < f->n; j++) {
        const Layer *l = &f->layers[j];
        const Code *code = f->codes[j] = find_code(f->kernels, l, f->batch);
        const int gathers = f->batch == 1 && l->C == 1 && !is_tall(l);
        work += (gathers ? GATHERED : f->batch) * kept_weights(l);
        widest = max64(widest, l->out);
        if (is_tall(l))
            least = min64(least, l->R % 8 ? max64(2, L / 4) : L - L / 4);
        c.all &= code != NULL;
        if (code)
            c.bytes += (int64_t)code->used, c.longest = max64(c.longest, l->in);
    }
    threads = threads_now((int)max64(1, min64(threads, work / WORTH_A_THREAD)));
    c.shared = threads > 1 && c.bytes > min64(SHARED_CODE * f->batch / threads, HUGE_CODE);
    /* a panel costs the same whether it is full or not; rows of tall blocks pay below 3/4 of one,
       of blocks of 4 outputs below 1/4 */
    if (least > L)
        least = f->batch == 1 ? L : 1;
    f->panels = f->batch / L + (f->batch % L >= least);
    f->unit = c.bytes > MUCH_CODE && !c.all ? TILE_PANELS : 1;
    f->units = ceil_div(f->panels, f->unit);
    f->tiles = min64(f->units, ceil_div(f->panels, panels_of_tile(f, &c, threads)));
    const int64_t tasks = f->tiles + (f->batch > f->panels * L);
    const int across = c.shared || tasks < threads ? 1 : threads;
    f->threads = threads / across;
    const int64_t panels = f->tiles ? ceil_div(f->units, f->tiles) * f->unit : 1;
    f->part = panels * (widest + 5) * L;
    f->part = ceil_div(f->part, 16) * 16;
    return across;
}

/* A large result is new memory, of which a page at a time would have to be given to the process. */
static void ask_for_huge_pages(float *y, int64_t floats)
{
#ifdef MADV_HUGEPAGE
    enum { LARGE = 1 << 21, PAGE = 4096 };
    if (floats >= LARGE) {
        const uintptr_t begin = ((uintptr_t)y + PAGE - 1) & ~(uintptr_t)(PAGE - 1);
        madvise((void *)begin, floats * sizeof(float) - PAGE, MADV_HUGEPAGE); /* no matter if not */
    }
#endif
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
    ask_for_huge_pages(y, batch * layers[n - 1].out);
    parallel_for(across, f.tiles + (first_row(&f, f.tiles) < batch), forward_tile, &f);
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
