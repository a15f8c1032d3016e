/* What a call does: passes layers over tiles of the batch, on threads. Included after the kernels of
   every instruction set. */

/* Room for at least `floats`, or NULL; aligned_alloc takes whole multiples of the alignment. */
static float *allocate(int64_t floats)
{
    return aligned_alloc(64, (floats / 16 + 1) * 64);
}

static int64_t lanes_for(const Kernels *k, int64_t rows)
{
    const int64_t L = k->lanes;
    return rows <= L ? L : rows <= 2 * L ? 2 * L : 4 * L;
}

/* A thread is worth starting for this many multiply-adds, 5 to 10 us. */
enum { WORTH_A_THREAD = 1 << 18 };

/* Batch rows that pass through tall layers together: four register tiles of the largest. */
enum { TALL_TILE = 56 };

typedef struct {
    const Kernels *kernels;
    const Layer *layers;
    int n, threads; /* layers; threads for one layer of one tile */
    const float *x;
    float *y;
    int64_t ldx, batch, tile, part; /* rows of a tile; floats of one scratch buffer */
    float *scratch;                 /* (workers, 2, part) */
} Forward;

static int is_tall(const Layer *l) { return l->R % 8 == 0; }

/* One layer on one tile, cut into ranges of outputs. */
typedef struct {
    const Kernels *kernels;
    const Layer *layer;
    const float *x;
    float *y;
    int64_t ldx, ldy, rows, lanes, range;
} Step;

static void step_range(void *arg, int64_t i, int worker)
{
    const Step *s = arg;
    const Layer *l = s->layer;
    const int64_t all = is_tall(l) ? block_rows(l) : l->out;
    const int64_t begin = i * s->range, end = min64(all, begin + s->range);
    (void)worker;
    if (is_tall(l))
        (l->R % 16 ? s->kernels->tall8 : s->kernels->tall16)(l, begin, end, s->x, s->ldx, s->y,
                                                             s->ldy, s->rows);
    else if (s->rows == 1)
        s->kernels->single(l, begin, end, s->x, s->y);
    else
        s->kernels->wide(l, begin, end, s->x, s->y, s->lanes);
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
   rows or transposed as the next layer wants them. */
static void forward_tile(void *arg, int64_t i, int worker)
{
    const Forward *f = arg;
    const Kernels *k = f->kernels;
    const int64_t begin = i * f->tile, rows = min64(f->tile, f->batch - begin);
    const int64_t lanes = lanes_for(k, rows);
    float *buffer = f->scratch + 2 * f->part * worker, *other = buffer + f->part;
    float *y = f->y + begin * f->layers[f->n - 1].out;
    const float *x = f->x + begin * f->ldx;
    int64_t ldx = f->ldx;
    int transposed = 0;
    for (int j = 0; j < f->n; j++) {
        const Layer *l = &f->layers[j];
        const int wide = !is_tall(l) && rows > 1, last = j == f->n - 1;
        if (wide != transposed) {
            if (wide)
                k->transpose(x, ldx, rows, l->in, buffer, lanes, lanes);
            else
                k->transpose(x, lanes, l->in, rows, buffer, l->in, l->in);
            x = buffer, ldx = l->in, buffer = other, other = (float *)x;
            transposed = wide;
        }
        const int64_t all = is_tall(l) ? block_rows(l) : l->out;
        Step step = {.kernels = k, .layer = l, .x = x, .ldx = ldx, .ldy = l->out, .rows = rows,
                     .lanes = lanes, .range = ceil_div(all, f->threads > 1 ? 4 * f->threads : 1)};
        step.y = last && !wide ? y : buffer;
        if (j == 0 && is_tall(l))
            touch(x, ldx, rows, l->in);
        parallel_for(f->threads, ceil_div(all, step.range), step_range, &step);
        x = step.y, ldx = l->out, buffer = other, other = (float *)x;
    }
    if (transposed)
        k->transpose(x, lanes, ldx, rows, y, ldx, ldx);
}

/* 0, or -1 if there is no memory for the scratch. */
static int forward(const Kernels *k, const Layer *layers, int n, const float *x, int64_t ldx,
                   float *y, int64_t batch, int threads)
{
    int64_t work = 0, widest = layers[0].in;
    int any_wide = 0;
    if (batch == 0)
        return 0;
    for (int j = 0; j < n; j++) {
        work += batch * kept_weights(&layers[j]);
        widest = max64(widest, layers[j].out);
        any_wide |= !is_tall(&layers[j]);
    }
    const int64_t tile = any_wide ? lanes_for(k, batch) : min64(TALL_TILE, batch);
    const int64_t tiles = ceil_div(batch, tile);
    threads = (int)max64(1, min64(threads, work / WORTH_A_THREAD));
    const int across = tiles >= threads ? threads : 1; /* threads over tiles, or over outputs */
    Forward f = {.kernels = k, .layers = layers, .n = n, .threads = threads / across, .x = x,
                 .y = y, .ldx = ldx, .batch = batch, .tile = tile,
                 .part = ceil_div(widest * tile, 16) * 16};
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
