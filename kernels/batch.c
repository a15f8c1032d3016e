/* What a call does: passes layers over tiles of the batch, on threads. Included after the kernels of
   every instruction set. */

/* Room for at least `floats`, or NULL; aligned_alloc takes whole multiples of the alignment. */
static float *allocate(int64_t floats)
{
    return aligned_alloc(64, (floats / 16 + 1) * 64);
}

/* A thread is worth starting for this many multiply-adds, 5 to 10 us. */
enum { WORTH_A_THREAD = 1 << 18 };

/* Rows of a tile, which passes through the layers together. */
enum {
    TALL_TILE = 56,        /* of tall layers: four register tiles of the largest */
    WIDE_PANELS = 4,       /* in panels: those that share a load of a weight */
    CODE_PANELS = 16,      /* that share a piece of code in the first cache */
    LONG_CODE_PANELS = 32, /* where layers are long, and pieces take fewer inputs */
};

/* Bytes of code that share the second cache with the batch. Threads that run more than these share
   a tile, each with outputs of its own. */
enum { MUCH_CODE = 1 << 19 };
enum {LEAST_INVERSE = 33};

typedef struct {
    const Kernels *kernels;
    const Layer *layers;
    const Code **codes; /* of each layer, or NULL */
    int n, threads;     /* layers; threads for one layer of one tile */
    const float *x;
    float *y;
    int64_t ldx, batch, tile, part; /* rows of a tile; floats of one scratch buffer */
    float *scratch;                 /* (workers, 2, part) */
} Forward;

static int is_tall(const Layer *l) { return l->R % 8 == 0; }

/* Panels that rows of the batch take: some number of times those of one load, or 1 or 2. */
static int64_t panels_of(const Kernels *k, int64_t rows)
{
    const int64_t panels = ceil_div(rows, k->lanes);
    return panels <= 2 ? panels : ceil_div(panels, WIDE_PANELS) * WIDE_PANELS;
}

/* Floats from panel to panel; those of a power of two would meet in few places of the caches. */
static int64_t panel_stride(const Kernels *k, int64_t features)
{
    return (features + (features % 64 == 0 ? 5 : 0)) * k->lanes;
}

/* One layer on one tile, cut into ranges of outputs: x and y are rows, or panels. */
typedef struct {
    const Kernels *kernels;
    const Layer *layer;
    const Code *code;
    const float *x;
    float *y;
    int64_t ldx, ldy, rows, panels; /* panels: 0 for rows */
    int64_t outputs, range;         /* outputs, block rows or groups of the code */
} Step;

static void step_range(void *arg, int64_t i, int worker)
{
    const Step *s = arg;
    const Layer *l = s->layer;
    const Kernels *k = s->kernels;
    const int64_t begin = i * s->range, end = min64(s->outputs, begin + s->range);
    (void)worker;
    if (is_tall(l))
        for (int64_t m = 0; m < s->rows; m += TALL_TILE)
            (l->R % 16 ? k->tall8 : k->tall16)(l, begin, end, s->x + m * s->ldx, s->ldx,
                                               s->y + m * s->ldy, s->ldy,
                                               min64(TALL_TILE, s->rows - m));
    else if (s->code)
        k->run_code(s->code, l, begin, end, s->x, s->ldx, s->y, s->ldy, s->panels);
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
    int into;
} Turn;

static void turn_range(void *arg, int64_t i, int worker)
{
    const Turn *t = arg;
    const int64_t lanes = t->kernels->lanes, begin = i * t->range;
    const int64_t features = min64(t->features - begin, t->range);
    (void)worker;
    for (int64_t p = 0; p < t->panels; p++) {
        const int64_t row = p * lanes * t->ldrows + begin, panel = p * t->ldpanels + begin * lanes;
        const int64_t rows = max64(0, min64(lanes, t->rows - p * lanes));
        if (t->into)
            t->kernels->transpose(t->from + row, t->ldrows, rows, features, t->to + panel, lanes,
                                  lanes);
        else if (rows)
            t->kernels->transpose(t->from + panel, lanes, features, rows, t->to + row, t->ldrows,
                                  features);
    }
}

/* Brings x (rows, in) into cache. Tall blocks read it in no order, in which memory is slow; a load
   of each line in order is fast, and faster than prefetches. */
static void touch(const float *x, int64_t ldx, int64_t rows, int64_t in)
{
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < in; k += 16)
            (void)*(const volatile float *)(x + m * ldx + k);
}

/* Rows i * tile .. of the batch through all layers. Activations stay in the two scratch buffers, as
   rows or as panels, as the next layer wants them. */
static void forward_tile(void *arg, int64_t i, int worker)
{
    const Forward *f = arg;
    const Kernels *k = f->kernels;
    const int64_t begin = i * f->tile, rows = min64(f->tile, f->batch - begin);
    const int64_t panels = panels_of(k, rows), parts = f->threads > 1 ? 4 * f->threads : 1;
    float *buffer = f->scratch + 2 * f->part * worker, *other = buffer + f->part;
    float *y = f->y + begin * f->layers[f->n - 1].out;
    const float *x = f->x + begin * f->ldx;
    int64_t ldx = f->ldx;
    int in_panels = 0;
    for (int j = 0; j <= f->n; j++) {
        const int last = j == f->n; /* which turns what is left into rows of y */
        const Layer *l = &f->layers[last ? j - 1 : j];
        const int wide = !last && !is_tall(l) && f->batch > 1;
        const int64_t features = last ? l->out : l->in;
        if (wide != in_panels) {
            const int64_t ldpanels = panel_stride(k, features);
            Turn turn = {.kernels = k, .from = x, .to = last ? y : buffer, .rows = rows,
                         .ldrows = wide ? ldx : features, .ldpanels = ldpanels, .panels = panels,
                         .features = features, .into = wide,
                         .range = ceil_div(ceil_div(features, parts), 64) * 64};
            parallel_for(f->threads, ceil_div(features, turn.range), turn_range, &turn);
            x = turn.to, ldx = wide ? ldpanels : features, buffer = other, other = turn.to;
            in_panels = wide;
        }
        if (last)
            break;
        Step step = {.kernels = k, .layer = l, .code = f->codes[j], .x = x,
                     .ldx = ldx, .ldy = wide ? panel_stride(k, l->out) : l->out, .rows = rows,
                     .panels = wide ? panels : 0};
        step.outputs = step.code ? step.code->groups : is_tall(l) ? block_rows(l) : l->out;
        step.range = ceil_div(step.outputs, parts);
        step.y = j == f->n - 1 && !wide ? y : buffer;
        if (j == 0 && is_tall(l))
            touch(x, ldx, rows, l->in);
        parallel_for(f->threads, ceil_div(step.outputs, step.range), step_range, &step);
        x = step.y, ldx = step.ldy, buffer = other, other = (float *)x;
    }
}

/* The code of a layer, or NULL where there is none or where it does not pay. */
static const Code *find_code(const Kernels *k, const Layer *l, int64_t batch)
{
    const int64_t kept = kept_weights(l);
    const int pays = !is_tall(l) && kept * LEAST_INVERSE >= l->in * l->out && batch >= (kept > 1 << 15 ? 64 : 16);
    return k->code_of && l->program && pays ? k->code_of(l->program) : NULL;
}

/* 0, or -1 if there is no memory for the scratch. */
static int forward(const Kernels *k, const Layer *layers, int n, const float *x, int64_t ldx,
                   float *y, int64_t batch, int threads)
{
    const Code *codes[MAX_LAYERS] = {NULL};
    int64_t work = 0, widest = layers[0].in, longest = 0, code = 0;
    int any_wide = 0, all_code = 1;
    if (batch == 0)
        return 0;
    for (int j = 0; j < n; j++) {
        const Layer *l = &layers[j];
        work += batch * kept_weights(l);
        widest = max64(widest, l->out);
        any_wide |= !is_tall(l);
        codes[j] = find_code(k, l, batch);
        all_code &= codes[j] != NULL;
        if (codes[j]) {
            code += codes[j]->used;
            longest = max64(longest, l->in);
        }
    }
    threads = (int)max64(1, min64(threads, work / WORTH_A_THREAD));
    const int64_t L = k->lanes;
    int64_t tile = any_wide ? WIDE_PANELS * L : TALL_TILE;
    if (code > MUCH_CODE)
        tile = L * (longest > LONG ? LONG_CODE_PANELS : CODE_PANELS);
    else if (all_code)
        tile = L * min64(CODE_PANELS, ceil_div(ceil_div(batch, L), threads));
    tile = min64(tile, batch);
    const int64_t tiles = ceil_div(batch, tile);
    const int across = tiles >= threads && code <= MUCH_CODE ? threads : 1;
    const int64_t rows = any_wide ? panels_of(k, tile) * L : tile;
    Forward f = {.kernels = k, .layers = layers, .codes = codes, .n = n, .threads = threads / across,
                 .x = x, .y = y, .ldx = ldx, .batch = batch, .tile = tile,
                 .part = panel_stride(k, ceil_div(widest, 64) * 64) * ceil_div(rows, L)};
    f.scratch = allocate(across * 2 * f.part);
    if (!f.scratch)
        return -1;
    parallel_for(across, tiles, forward_tile, &f);
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
    parallel_for(nnz * size < WORTH_A_THREAD ? 1 : threads, ceil_div(nnz, pack.range), pack_range,
                 &pack);
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
    threads = (int)max64(1, min64(threads, weights * g->batch / WORTH_A_THREAD));
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
