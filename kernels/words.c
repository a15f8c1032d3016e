/* What a call on bf16 or int8 does: packs the weight, passes tiles of the batch, on threads.
   Included after batch.c and the kernels of every instruction set. */

static char *allocate_bytes(int64_t bytes) { return (char *)allocate(ceil_div(bytes, 4)); }

/* Bytes of a row of `features`: floats, or bf16 in whole words. */
static int64_t row_bytes(const WordKernels *k, int64_t features)
{
    return 4 * (k->quantize ? features : ceil_div(features, 2));
}

/* Whether rows of the batch beat lanes of it: for few of them nothing is transposed or packed.
   Blocks that a word does not fit into waste a part of it there. */
static int is_better_tall(const WordKernels *k, const WordLayer *l, int64_t batch)
{
    return batch <= (l->C < l->per_word ? 8 : k->most_lanes);
}

/* How many of `each` a thread takes at a time, of which there are to be about `about`. */
static int64_t of_about(int64_t about, int64_t each) { return max64(1, about / each); }

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

/* Sets l->packed and l->inputs, which are in l->memory unless the layer can be read as it is stored;
   without values only the inputs. 0, or -1 if there is no memory. */
static int pack_words(const WordKernels *k, WordLayer *l, const Blocks *blocks, int threads)
{
    const int64_t rows = ceil_div(l->out, l->R), kept = l->crow[rows] * l->C;
    const int whole = l->planes || l->in % l->per_word == 0;
    const int as_stored =
        !blocks->values || (l->R == 1 && !blocks->slots && whole && !in_groups(l));
    const int64_t bytes = as_stored ? 0 : 4 * groups_before(l, rows) * l->R;
    const int64_t inputs = in_groups(l) ? 4 * groups_before(l, rows)
                           : l->C == 1  ? 0
                           : l->planes  ? kept
                                        : kept / l->per_word;
    l->memory = allocate_bytes(bytes + 4 * inputs);
    if (!l->memory)
        return -1;
    l->packed = as_stored ? NULL : l->memory;
    l->inputs = inputs ? (int32_t *)(l->memory + bytes) : l->col;
    if (as_stored && !inputs)
        return 0;
    WordPack pack = {.kernels = k, .layer = l, .blocks = blocks,
                     .packed = as_stored ? NULL : l->memory,
                     .inputs = inputs ? (int32_t *)l->inputs : NULL,
                     .range = of_about(1 << 14, ceil_div(kept * l->R, rows) + 1)};
    parallel_for(kept * l->R < WORTH_A_THREAD ? 1 : threads, ceil_div(rows, pack.range),
                 word_pack_range, &pack);
    return 0;
}

/* The sums of the outputs' weights in int8 -> totals (out,), which are 0 before. */
static void add_weights(const WordLayer *l, int32_t *totals)
{
    const int8_t *w = (const int8_t *)l->values;
    for (int64_t i = 0; i * l->R < l->out; i++)
        for (int64_t j = 0, n = kept_inputs(l, i), first = l->crow[i] * l->C; j < n; j++)
            for (int64_t r = 0; r < min64(l->R, l->out - i * l->R); r++)
                totals[i * l->R + r] += w[(first + j) * l->R + r];
}

typedef struct {
    const WordKernels *kernels;
    const WordLayer *layers;
    int n, threads; /* layers; threads for one layer of one tile */
    const char *x;
    char *y;
    int64_t ldx, ldy, batch, tile; /* ldx, ldy in bytes; rows of a tile, which are its lanes */
    char *scratch;                 /* (workers, part) */
    int64_t part, rows_part, x_part, y_part, range_part; /* bytes */
} WordForward;

/* One layer on one tile of the batch, which is rows or, from a layer that leaves it so, lanes. */
typedef struct {
    const WordKernels *kernels;
    const WordLayer *layer;
    const char *rows;   /* (count, in), or NULL */
    char *x, *y;        /* the words of lanes; (out, lanes) */
    char *ranges;       /* (threads, range_part) outputs on their way to rows */
    char *to;           /* (count, out), or NULL */
    int64_t ldrows, ldto, count, lanes, range_part, range;
    Scaling scaling;
} WordStep;

/* Words of x, or block rows, that a thread takes at a time. An even number of the latter, since two
   outputs may share a word. */
enum { WORDS_ENTERING = 64, OUTPUTS_TAKEN = 64 };

static int64_t word_range(const WordLayer *l) { return 2 * of_about(OUTPUTS_TAKEN / 2, l->R); }

/* Bytes of an output in a lane. */
static int64_t lane_bytes(const WordKernels *k) { return k->quantize ? 4 : 2; }

static void word_enter_range(void *arg, int64_t i, int worker)
{
    const WordStep *s = arg;
    const WordLayer *l = s->layer;
    const int64_t begin = i * WORDS_ENTERING, all = ceil_div(l->in, l->per_word);
    (void)worker;
    s->kernels->enter((const float *)s->rows, s->ldrows / 4, s->count, begin,
                      min64(all, begin + WORDS_ENTERING), l, s->x, s->lanes, &s->scaling);
}

static void word_output_range(void *arg, int64_t i, int worker)
{
    const WordStep *s = arg;
    const WordLayer *l = s->layer;
    const int64_t begin = i * s->range, end = min64(ceil_div(l->out, l->R), begin + s->range);
    const int64_t first = begin * l->R, outputs = min64(l->out, end * l->R) - first;
    if (l->tall) {
        s->kernels->tall(l, begin, end, s->rows, s->ldrows, &s->scaling, s->to, s->ldto, s->count);
        return;
    }
    char *y = s->to ? s->ranges + worker * s->range_part
                    : s->y + first * s->lanes * lane_bytes(s->kernels);
    s->kernels->outputs(l, begin, end, s->x, s->lanes, &s->scaling, y);
    if (s->to)
        s->kernels->leave(y, s->lanes, first, outputs, s->to, s->ldto / 4, s->count);
}

/* Rows i * tile .. of the batch through all layers. Between two that want rows they are in one of
   two buffers, between two that want lanes in s.y. */
static void word_tile(void *arg, int64_t i, int worker)
{
    const WordForward *f = arg;
    const WordKernels *k = f->kernels;
    const int64_t begin = i * f->tile;
    char *buffer = f->scratch + worker * f->part, *other = buffer + f->rows_part;
    WordStep s = {.kernels = k, .rows = f->x + begin * f->ldx, .ldrows = f->ldx,
                  .x = other + f->rows_part, .count = min64(f->tile, f->batch - begin),
                  .lanes = f->tile, .range_part = f->range_part};
    s.y = s.x + f->x_part;
    s.ranges = s.y + f->y_part;
    char *numbers = s.ranges + f->threads * f->range_part;
    if (k->quantize) {
        float *of_rows = (float *)(numbers + f->x_part);
        s.scaling = (Scaling){.scales = of_rows, .inverses = of_rows + f->tile,
                              .shifts = of_rows + 2 * f->tile,
                              .zeros = (int32_t *)of_rows + 3 * f->tile};
    }
    for (int j = 0; j < f->n; j++) {
        const WordLayer *l = s.layer = &f->layers[j];
        const int64_t words = ceil_div(l->in, l->per_word);
        const int last = j == f->n - 1;
        if (s.rows && k->quantize)
            k->measure((const float *)s.rows, s.ldrows / 4, s.count, l->in, s.lanes, &s.scaling);
        if (s.rows && k->quantize && (l->tall || !l->planes)) {
            k->quantize((const float *)s.rows, s.ldrows / 4, s.count, l->in, (uint8_t *)numbers,
                        words, &s.scaling);
            s.rows = numbers, s.ldrows = 4 * words;
        }
        if (!s.rows)
            k->reenter(s.y, l->in, s.lanes, l->planes, s.x, &s.scaling);
        else if (!l->tall)
            parallel_for(f->threads, ceil_div(words, WORDS_ENTERING), word_enter_range, &s);
        s.range = word_range(l);
        s.ldto = last ? f->ldy : row_bytes(k, l->out);
        s.to = last ? f->y + begin * f->ldy : l->tall || l[1].tall ? buffer : NULL;
        parallel_for(f->threads, ceil_div(ceil_div(l->out, l->R), s.range), word_output_range, &s);
        s.rows = s.to, s.ldrows = s.ldto;
        if (s.to)
            buffer = other, other = s.to;
    }
}

/* 0, or -1 if there is no memory. x, y: (batch, features), rows ldx bytes and row_bytes apart;
   blocks: of layers that are to be packed for this call, or NULL where they are */
static int word_forward(const WordKernels *k, WordLayer *layers, const Blocks *blocks, int n,
                        const void *x, int64_t ldx, void *y, int64_t batch, int threads)
{
    WordForward f = {.kernels = k, .layers = layers, .n = n, .x = x, .y = y, .ldx = ldx,
                     .ldy = row_bytes(k, layers[n - 1].out), .batch = batch,
                     .tile = batch > k->lanes ? k->most_lanes : k->lanes};
    const int64_t tiles = ceil_div(batch, f.tile);
    int64_t work = 0;
    int failed = 0;
    if (batch == 0)
        return 0;
    for (int j = 0; j < n; j++) {
        WordLayer *l = &layers[j];
        l->tall = l->values && l->R % k->height == 0 && is_better_tall(k, l, batch);
        work += batch * l->crow[ceil_div(l->out, l->R)] * l->R * l->C;
        f.x_part = max64(f.x_part, 4 * f.tile * ceil_div(l->in, l->per_word));
        f.range_part = max64(f.range_part, 4 * f.tile * word_range(l) * l->R);
        if (j < n - 1) {
            f.rows_part = max64(f.rows_part, f.tile * row_bytes(k, l->out));
            f.y_part = max64(f.y_part, 4 * f.tile * ceil_div(l->out, l->R) * l->R);
        }
    }
    threads = threads_now((int)max64(1, min64(threads, work / WORTH_A_THREAD)));
    const int across = tiles >= threads ? threads : 1; /* threads over tiles, or over outputs */
    f.threads = threads / across;
    f.part = 2 * f.rows_part + f.x_part + f.y_part + f.threads * f.range_part;
    f.part += k->quantize ? f.x_part + 16 * f.tile : 0;
    f.scratch = allocate_bytes(across * f.part);
    for (int j = 0; blocks && j < n; j++)
        if (!layers[j].tall && pack_words(k, &layers[j], &blocks[j], threads))
            failed = -1;
    if (!f.scratch)
        failed = -1;
    if (!failed)
        parallel_for(across, tiles, word_tile, &f);
    for (int j = 0; blocks && j < n; j++)
        free(layers[j].memory);
    free(f.scratch);
    return failed;
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
        k->enter(s->grad, s->ldg, s->rows, begin, min64(outputs, end), s->layer, s->grad_planes,
                 s->lanes, NULL);
    if (begin < inputs)
        k->enter(s->x, s->ldx, s->rows, begin, min64(inputs, end), s->layer, s->x_planes, s->lanes,
                 NULL);
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
    char *scratch = allocate_bytes(4 * ((outputs + inputs) * lanes + weights));
    threads = threads_now((int)max64(1, min64(threads, weights * batch / WORTH_A_THREAD)));
    if (!scratch || pack_words(k, l, &none, threads)) {
        free(scratch);
        return -1;
    }
    WordSddmm s = {.kernels = k, .layer = l, .grad_planes = scratch, .ldg = ldg, .ldx = ldx,
                   .lanes = lanes, .range = of_about(64, l->R), .first = 1};
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
    free(l->memory);
    free(scratch);
    return 0;
}
