/* What a call on bf16 or int8 does: packs the weight, passes tiles of the batch, on threads.
   Included after batch.c and the kernels of every instruction set. */

static char *allocate_bytes(int64_t bytes) { return (char *)allocate(ceil_div(bytes, 4)); }

/* How many of `each` a thread takes at a time, of which there are to be about `about`. */
static int64_t range_of(int64_t about, int64_t each) { return max64(1, about / each); }

typedef struct {
    const WordKernels *kernels;
    const WordLayer *layer;
    const Blocks *blocks;
    char *packed;
    int32_t *inputs;
    int64_t range;
} WordPack;

static void word_pack_range(void *arg, int64_t i, int worker)
{
    const WordPack *p = arg;
    const int64_t begin = i * p->range, rows = ceil_div(p->layer->out, p->layer->R);
    (void)worker;
    p->kernels->pack(p->layer, p->blocks, begin, min64(rows, begin + p->range), p->packed,
                     p->inputs);
}

/* Sets l->packed and l->inputs, in *to unless the layer can be read as it is stored; without values
   only the inputs. 0, or -1 if there is no memory. */
static int pack_words(const WordKernels *k, WordLayer *l, const Blocks *blocks, int threads,
                      char **to)
{
    const int64_t rows = ceil_div(l->out, l->R), kept = l->crow[rows] * l->C;
    const int whole = l->planes || l->in % l->per_word == 0;
    const int as_stored = !blocks->values || (l->R == 1 && !blocks->slots && whole);
    const int64_t bytes = as_stored ? 0 : 4 * words_before(l, rows);
    const int64_t inputs = l->C == 1 ? 0 : l->planes ? kept : kept / l->per_word;
    *to = allocate_bytes(bytes + 4 * inputs);
    if (!*to)
        return -1;
    l->values = blocks->values;
    l->packed = as_stored ? NULL : *to;
    l->inputs = inputs ? (int32_t *)(*to + bytes) : l->col;
    if (as_stored && !inputs)
        return 0;
    WordPack pack = {.kernels = k, .layer = l, .blocks = blocks, .packed = (char *)l->packed,
                     .inputs = inputs ? (int32_t *)l->inputs : NULL,
                     .range = range_of(1 << 14, ceil_div(kept * l->R, rows) + 1)};
    parallel_for(kept * l->R < WORTH_A_THREAD ? 1 : threads, ceil_div(rows, pack.range),
                 word_pack_range, &pack);
    return 0;
}

typedef struct {
    const WordKernels *kernels;
    const WordLayer *layer;
    const void *x;
    char *y;
    int64_t ldx, ldy, batch, lanes; /* ldx in words of bf16, in floats of int8; ldy in words */
    int64_t range;                  /* block rows that a thread takes at a time */
    int threads;                    /* for one tile */
    char *scratch;                  /* (workers, part) */
    int64_t part, y_part;
} WordForward;

/* One tile of the batch: its rows, and x transposed. */
typedef struct {
    const WordForward *call;
    const float *rows;
    char *x, *y; /* y: (threads, y_part) */
    int64_t ldx, begin, count;
    Scaling scaling;
} WordTile;

enum { WORDS_ENTERING = 64 };

static void word_enter_range(void *arg, int64_t i, int worker)
{
    const WordTile *t = arg;
    const WordLayer *l = t->call->layer;
    const int64_t begin = i * WORDS_ENTERING, all = ceil_div(l->in, l->per_word);
    (void)worker;
    t->call->kernels->enter(t->rows, t->ldx, t->count, begin, min64(all, begin + WORDS_ENTERING),
                            l->planes, t->x, t->call->lanes);
}

static void word_output_range(void *arg, int64_t i, int worker)
{
    const WordTile *t = arg;
    const WordForward *f = t->call;
    const WordLayer *l = f->layer;
    const int64_t begin = i * f->range, end = min64(ceil_div(l->out, l->R), begin + f->range);
    const int64_t first = begin * l->R, outputs = min64(l->out, end * l->R) - first;
    char *y = t->y + worker * f->y_part;
    f->kernels->outputs(l, begin, end, t->x, f->lanes, &t->scaling, y);
    f->kernels->leave(y, f->lanes, first, outputs, f->y + 4 * t->begin * f->ldy, f->ldy, t->count);
}

static void word_tile(void *arg, int64_t i, int worker)
{
    const WordForward *f = arg;
    const WordLayer *l = f->layer;
    const int64_t words = ceil_div(l->in, l->per_word), begin = i * f->lanes;
    char *scratch = f->scratch + worker * f->part;
    WordTile t = {.call = f, .x = scratch, .y = scratch + 4 * words * f->lanes, .ldx = f->ldx,
                  .begin = begin, .count = min64(f->lanes, f->batch - begin)};
    t.rows = (const float *)f->x + begin * f->ldx;
    if (f->kernels->quantize) {
        uint8_t *rows = (uint8_t *)t.y + f->threads * f->y_part;
        t.scaling.scales = (float *)(rows + 4 * words * f->lanes);
        t.scaling.zeros = (int32_t *)(t.scaling.scales + f->lanes);
        f->kernels->quantize(t.rows, f->ldx, t.count, l->in, rows, words, &t.scaling);
        t.rows = (const float *)rows, t.ldx = words;
    }
    parallel_for(f->threads, ceil_div(words, WORDS_ENTERING), word_enter_range, &t);
    parallel_for(f->threads, ceil_div(ceil_div(l->out, l->R), f->range), word_output_range, &t);
}

/* 0, or -1 if there is no memory. x: bf16 in whole words, or for int8 floats */
static int word_forward(const WordKernels *k, WordLayer *l, const Blocks *blocks, const void *x,
                        int64_t ldx, void *y, int64_t ldy, int64_t batch, int threads)
{
    const int64_t rows = ceil_div(l->out, l->R), words = ceil_div(l->in, l->per_word);
    const int64_t lanes = batch > k->lanes ? k->most_lanes : k->lanes;
    const int64_t tiles = ceil_div(batch, lanes);
    char *packed;
    if (batch == 0)
        return 0;
    threads = (int)max64(1, min64(threads, batch * l->crow[rows] * l->R * l->C / WORTH_A_THREAD));
    if (pack_words(k, l, blocks, threads, &packed))
        return -1;
    const int across = tiles >= threads ? threads : 1; /* threads over tiles, or over outputs */
    WordForward f = {.kernels = k, .layer = l, .x = x, .y = y, .ldx = ldx, .ldy = ldy,
                     .batch = batch, .lanes = lanes, .threads = threads / across,
                     .range = 2 * range_of(32, l->R)}; /* even: two outputs may share a word */
    f.y_part = f.range * l->R * lanes * 4;
    f.part = 4 * words * lanes + f.threads * f.y_part;
    f.part += k->quantize ? (4 * words + 8) * lanes : 0;
    f.scratch = allocate_bytes(across * f.part);
    if (f.scratch)
        parallel_for(across, tiles, word_tile, &f);
    free(packed);
    free(f.scratch);
    return f.scratch ? 0 : -1;
}

/* The weight gradient in bf16, in panels of the batch that are added up in order. */
typedef struct {
    const WordKernels *kernels;
    const WordLayer *layer;
    const float *grad, *x; /* rows of the panel */
    char *grad_planes, *x_planes;
    int64_t ldg, ldx, rows, lanes, range;
    int first; /* whether this is the first panel */
    WordGradient gradient;
} WordSddmm;

static void word_sddmm_enter(void *arg, int64_t i, int worker)
{
    const WordSddmm *s = arg;
    const int64_t begin = i * WORDS_ENTERING, end = begin + WORDS_ENTERING;
    const int64_t outputs = ceil_div(s->layer->out, 2), inputs = ceil_div(s->layer->in, 2);
    const WordKernels *k = s->kernels;
    (void)worker;
    if (begin < outputs)
        k->enter(s->grad, s->ldg, s->rows, begin, min64(outputs, end), 1, s->grad_planes, s->lanes);
    if (begin < inputs)
        k->enter(s->x, s->ldx, s->rows, begin, min64(inputs, end), 1, s->x_planes, s->lanes);
}

static void word_sddmm_range(void *arg, int64_t i, int worker)
{
    const WordSddmm *s = arg;
    const int64_t begin = i * s->range, rows = ceil_div(s->layer->out, s->layer->R);
    (void)worker;
    s->kernels->sddmm(&s->gradient, begin, min64(rows, begin + s->range), s->grad_planes,
                      s->x_planes, s->lanes, s->first);
}

/* grad (batch, out), x (batch, in), in whole words -> values (nnz, C, R), whose padding must be 0
   before. 0, or -1 if there is no memory. */
static int word_sddmm(const WordKernels *k, WordLayer *l, const void *grad, int64_t ldg,
                      const void *x, int64_t ldx, int64_t batch, uint16_t *values, int threads)
{
    const int64_t rows = ceil_div(l->out, l->R), weights = l->crow[rows] * l->R * l->C;
    const int64_t outputs = ceil_div(l->out, 2), inputs = ceil_div(l->in, 2);
    const Blocks none = {0};
    const int64_t lanes = min64(k->panel, ceil_div(batch, k->lanes) * k->lanes);
    char *packed = NULL, *scratch = allocate_bytes(4 * ((outputs + inputs) * lanes + weights));
    threads = (int)max64(1, min64(threads, weights * batch / WORTH_A_THREAD));
    if (!scratch || pack_words(k, l, &none, threads, &packed)) {
        free(scratch);
        return -1;
    }
    WordSddmm s = {.kernels = k, .layer = l, .grad_planes = scratch, .ldg = ldg, .ldx = ldx,
                   .lanes = lanes, .range = range_of(64, l->R), .first = 1};
    s.x_planes = s.grad_planes + 4 * outputs * lanes;
    s.gradient = (WordGradient){.layer = l, .values = (float *)(s.x_planes + 4 * inputs * lanes)};
    memset(s.gradient.values, 0, 4 * weights);
    for (int64_t begin = 0; begin < batch; begin += lanes, s.first = 0) {
        s.grad = (const float *)grad + begin * ldg, s.x = (const float *)x + begin * ldx;
        s.rows = min64(lanes, batch - begin);
        parallel_for(threads, ceil_div(max64(outputs, inputs), WORDS_ENTERING), word_sddmm_enter,
                     &s);
        parallel_for(threads, ceil_div(rows, s.range), word_sddmm_range, &s);
    }
    k->round(s.gradient.values, weights, values);
    free(packed);
    free(scratch);
    return 0;
}
