/* The linear layer on words of 2 bf16 or 4 int8, included once for each type and instruction set,
   after linear_cpu.c of that set.

   NAME(f)    f with the suffix of type and instruction set; FLOATS(f): of linear_cpu.c's f
   TARGET     the attribute that selects the instruction set
   LANES      words in a vector register
   PER_WORD   numbers in a word: 2 are bf16, 4 int8
   DOT        acc + the products of the numbers of two words, added up: of sums, weights, inputs;
              undefined where no instruction does it

   The batch is in the lanes, as for wide blocks of linear_cpu.c: a word of weights meets the words
   of a vector of the batch. The numbers of a word of x come from inputs that the pattern chose, so
   that no product is with a zero: a plane holds one input of the tile, in such an order that
   zipping planes, which stays within 128 bits, gives words in the order of the batch. */

#define BYTES (4 * LANES)
#if PER_WORD == 2
#define NUMBER uint16_t
#define SUMS floats
#else
#define NUMBER uint8_t
#define SUMS ints
#endif

typedef uint32_t NAME(words) __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t NAME(ints) __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef NUMBER NAME(numbers)
    __attribute__((vector_size(LANES * sizeof(NUMBER)), aligned(1), may_alias));
typedef float NAME(floats) __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint16_t NAME(halves) __attribute__((vector_size(BYTES), may_alias));
typedef uint8_t NAME(bytes) __attribute__((vector_size(BYTES), may_alias));
#define words NAME(words)
#define ints NAME(ints)
#define floats NAME(floats)
#define LOAD_WORDS(p) (*(const words *)(p))
#define STORE_WORDS(p, v) (*(words *)(p) = (v))
#define RELU(v) ((floats)((ints)(v) & ~(ints)((v) < 0))) /* NaN stays NaN */
#define INLINE static inline __attribute__((always_inline)) TARGET
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#ifndef DOT /* without an instruction for it: the numbers are widened in the words */
#if PER_WORD == 2
#define DOT(acc, w, x) NAME(dot)(acc, w, x)
INLINE floats NAME(dot)(floats acc, words w, words x)
{
    const words upper = (words){0} + 0xffff0000u;
    acc += (floats)(w << 16) * (floats)(x << 16);
    return acc + (floats)(w & upper) * (floats)(x & upper);
}
#else
#define DOT(acc, w, x) NAME(dot)(acc, w, x)
#ifndef ADD_PAIRS /* the products of halves of two words, added up */
#define ADD_PAIRS(a, b)                                                                            \
    (((ints)(a) << 16 >> 16) * ((ints)(b) << 16 >> 16) + ((ints)(a) >> 16) * ((ints)(b) >> 16))
#endif
INLINE ints NAME(dot)(ints acc, words w, words x)
{
    typedef int16_t pairs __attribute__((vector_size(BYTES), may_alias));
    const words even = x & 0x00ff00ff, odd = x >> 8 & 0x00ff00ff;
    acc += ADD_PAIRS(even, (pairs)(w << 8) >> 8);
    return acc + ADD_PAIRS(odd, (pairs)w >> 8);
}
#endif
#endif

#ifndef WIDEN /* LANES numbers from p on as words */
#define WIDEN(p) __builtin_convertvector(*(const NAME(numbers) *)(p), words)
#endif

#ifndef NARROW /* and back */
#define NARROW(p, v) UNROLL for (int a = 0; a < LANES; a++) ((NUMBER *)(p))[a] = (NUMBER)(v)[a]
#endif

/* Zips and unzips of 16 or 8 bits, in each 128 bits by itself: LO takes the first half of both
   vectors, or the even ones. */
#define PAIR16(q) q, 2 * LANES + q
#define ZIP_LO16(q) PAIR16(q), PAIR16(q + 1), PAIR16(q + 2), PAIR16(q + 3)
#define ZIP_HI16(q) ZIP_LO16(q + 4)
#define EVEN16(q) q, q + 2, q + 4, q + 6
#define UNZIP_LO16(q) EVEN16(q), EVEN16(2 * LANES + q)
#define UNZIP_HI16(q) UNZIP_LO16(q + 1)
#define PAIR8(q) q, 4 * LANES + q
#define FOUR8(q) PAIR8(q), PAIR8(q + 1), PAIR8(q + 2), PAIR8(q + 3)
#define ZIP_LO8(q) FOUR8(q), FOUR8(q + 4)
#define ZIP_HI8(q) ZIP_LO8(q + 8)
#define EVEN8(q) q, q + 2, q + 4, q + 6, q + 8, q + 10, q + 12, q + 14
#define UNZIP_LO8(q) EVEN8(q), EVEN8(4 * LANES + q)
#define UNZIP_HI8(q) UNZIP_LO8(q + 1)
#if LANES == 4
#define EACH_QUAD(f, n) f(0)
#elif LANES == 8
#define EACH_QUAD(f, n) f(0), f(n)
#else
#define EACH_QUAD(f, n) f(0), f(n), f(2 * n), f(3 * n)
#endif
#define SHUFFLE16(f, a, b)                                                                         \
    ((words)__builtin_shufflevector((NAME(halves))(a), (NAME(halves))(b), EACH_QUAD(f, 8)))
#define SHUFFLE8(f, a, b)                                                                          \
    ((words)__builtin_shufflevector((NAME(bytes))(a), (NAME(bytes))(b), EACH_QUAD(f, 16)))

/* PER_WORD vectors of planes <-> as many vectors of words, as many lanes in the batch's order. */
INLINE void NAME(zip)(const words *planes, words *to)
{
#if PER_WORD == 2
    to[0] = SHUFFLE16(ZIP_LO16, planes[0], planes[1]);
    to[1] = SHUFFLE16(ZIP_HI16, planes[0], planes[1]);
#else
    const words a = SHUFFLE8(ZIP_LO8, planes[0], planes[1]);
    const words b = SHUFFLE8(ZIP_HI8, planes[0], planes[1]);
    const words c = SHUFFLE8(ZIP_LO8, planes[2], planes[3]);
    const words d = SHUFFLE8(ZIP_HI8, planes[2], planes[3]);
    to[0] = SHUFFLE16(ZIP_LO16, a, c);
    to[1] = SHUFFLE16(ZIP_HI16, a, c);
    to[2] = SHUFFLE16(ZIP_LO16, b, d);
    to[3] = SHUFFLE16(ZIP_HI16, b, d);
#endif
}

INLINE void NAME(unzip)(const words *from, words *planes)
{
#if PER_WORD == 2
    planes[0] = SHUFFLE16(UNZIP_LO16, from[0], from[1]);
    planes[1] = SHUFFLE16(UNZIP_HI16, from[0], from[1]);
#else
    const words a = SHUFFLE16(UNZIP_LO16, from[0], from[1]);
    const words b = SHUFFLE16(UNZIP_LO16, from[2], from[3]);
    const words c = SHUFFLE16(UNZIP_HI16, from[0], from[1]);
    const words d = SHUFFLE16(UNZIP_HI16, from[2], from[3]);
    planes[0] = SHUFFLE8(UNZIP_LO8, a, b);
    planes[1] = SHUFFLE8(UNZIP_HI8, a, b);
    planes[2] = SHUFFLE8(UNZIP_LO8, c, d);
    planes[3] = SHUFFLE8(UNZIP_HI8, c, d);
#endif
}

/* Weights as words, and the list of inputs unless it is the pattern's own. */
static TARGET void NAME(pack)(const WordLayer *l, const Blocks *b, int64_t begin, int64_t end,
                              char *packed, int32_t *inputs)
{
    const int64_t R = l->R, C = l->C, size = R * C, step = b->output_step;
    for (int64_t i = begin; i < end; i++) {
        const int64_t first = l->crow[i], count = kept_inputs(l, i);
        int64_t n = first, c = 0;
        if (inputs && l->planes) { /* a group is filled up with inputs whose weights are 0 */
            const int64_t whole = in_groups(l) ? ceil_div(count, 4) * 4 : count;
            int32_t *list = inputs + (in_groups(l) ? 4 * groups_before(l, i) : first * C);
            for (int64_t j = 0; j < whole; j++)
                list[j] = j < count ? (int32_t)(l->col[first + j / C] * C + j % C) : 0;
        }
        else if (inputs)
            for (int64_t j = 0, per = C / PER_WORD; j < ceil_div(count, PER_WORD); j++)
                inputs[first * per + j] = (int32_t)(l->col[first + j / per] * per + j % per);
        if (!packed)
            continue;
        Word *to = (Word *)packed + groups_before(l, i) * R;
        for (int64_t j = 0; j < count; j += PER_WORD, to += R) {
            const NUMBER *from[PER_WORD], *at = b->values;
            NUMBER keep[PER_WORD]; /* nothing of a number beyond the last */
            UNROLL for (int t = 0; t < PER_WORD; t++) {
                keep[t] = j + t < count ? (NUMBER)~0 : 0;
                if (keep[t]) {
                    at = (const NUMBER *)b->values + c * b->input_step +
                         (b->slots ? b->slots[n] : n) * size;
                    if (++c == C)
                        c = 0, n++;
                }
                from[t] = at;
            }
#define PACK(step)                                                                                 \
    for (int64_t r = 0; r < R; r++) {                                                              \
        Word word = 0;                                                                             \
        UNROLL for (int t = 0; t < PER_WORD; t++)                                                  \
            word |= (Word)(NUMBER)(from[t][r * (step)] & keep[t]) << 32 / PER_WORD * t;            \
        to[r] = word;                                                                              \
    }
            if (step == 1)
                PACK(1)
            else
                PACK(step)
#undef PACK
        }
    }
}

/* nv vectors of words of as many inputs -> words, or planes `pitch` bytes apart */
INLINE void NAME(put)(const int nv, const int planes, const words *from, char *to, int64_t pitch)
{
    if (!planes)
        UNROLL for (int v = 0; v < nv; v++) STORE_WORDS(to + v * BYTES, from[v]);
    else if (nv < PER_WORD)
        UNROLL for (int t = 0; t < PER_WORD; t++) {
            const words numbers = from[0] >> 32 / PER_WORD * t;
            NARROW(to + t * pitch, numbers);
        }
    else
        UNROLL for (int u = 0; u < nv / PER_WORD; u++) {
            words some[PER_WORD];
            NAME(unzip)(from + u * PER_WORD, some);
            UNROLL for (int t = 0; t < PER_WORD; t++)
                STORE_WORDS(to + t * pitch + u * BYTES, some[t]);
        }
}

/* The words of a tile of nv vectors that hold the first `count` numbers of `inputs`: xs[v]. */
INLINE void NAME(get)(const int nv, const int planes, const int32_t *inputs, const int count,
                      const char *x, words *xs)
{
    const int64_t pitch = (int64_t)nv * LANES * (planes ? sizeof(NUMBER) : 4);
    if (!planes)
        UNROLL for (int v = 0; v < nv; v++) xs[v] = LOAD_WORDS(x + *inputs * pitch + v * BYTES);
    else if (nv < PER_WORD) {
        xs[0] = WIDEN(x + *inputs * pitch);
        UNROLL for (int t = 1; t < PER_WORD; t++) if (t < count)
            xs[0] |= WIDEN(x + inputs[t] * pitch) << 32 / PER_WORD * t;
    } else
        UNROLL for (int u = 0; u < nv / PER_WORD; u++) {
            words some[PER_WORD];
            UNROLL for (int t = 0; t < PER_WORD; t++)
                some[t] = t < count ? LOAD_WORDS(x + inputs[t] * pitch + u * BYTES) : (words){0};
            NAME(zip)(some, xs + u * PER_WORD);
        }
}

#if PER_WORD == 4
#ifndef MAX_INTS
#define LARGER(a, b) (((a) & ((a) > (b))) | ((b) & ~((a) > (b))))
#define MAX_INTS(a, b) LARGER(a, b)
#define MAX_WORDS(a, b) LARGER(a, b)
#endif

/* How rows become 256 steps from their least to their largest number, 0 among them and exact. Where
   all are as good as 0 the scale is 0, and where they are not finite NaN. most and least: (n,) bits
   of those numbers. The bits of floats are in their order as ints if positive, and as unsigned ints
   if negative, in reverse: NaN and infinity are beyond the rest. */
static TARGET void NAME(steps)(const int32_t *most, const uint32_t *least, int64_t n,
                               const Scaling *to)
{
    for (int64_t m = 0; m < n; m++) {
        const uint32_t negative = least[m] >> 31 ? least[m] : 0;
        float high, low;
        memcpy(&high, most + m, 4);
        memcpy(&low, &negative, 4);
        const float step = high / 255 - low / 255;
        const int any = step > 0x1p-120f && step < INFINITY;
        const float inverse = any ? 1 / step : 0, zero = any ? 0.5f - low * inverse : 0;
        to->scales[m] = any ? step : step - step;
        to->inverses[m] = inverse;
        to->zeros[m] = (int32_t)zero;
        to->shifts[m] = (float)(int32_t)zero + 0.5f;
    }
}

static TARGET void NAME(measure)(const float *x, int64_t ldx, int64_t rows, int64_t in,
                                 int64_t lanes, const Scaling *scaling)
{
    int32_t mosts[4 * LANES] = {0};
    uint32_t leasts[4 * LANES] = {0};
    for (int64_t m = 0; m < rows; m++, x += ldx) {
        ints most = {0};
        words least = {0}, bits = {0};
        int64_t k = 0;
        for (; k + LANES <= in; k += LANES) {
            bits = LOAD_WORDS(x + k);
            most = MAX_INTS((ints)bits, most);
            least = MAX_WORDS(bits, least);
        }
        bits = (words){0};
        memcpy(&bits, x + k, 4 * (in - k));
        most = MAX_INTS((ints)bits, most);
        least = MAX_WORDS(bits, least);
        UNROLL for (int a = 0; a < LANES; a++) {
            mosts[m] = most[a] > mosts[m] ? most[a] : mosts[m];
            leasts[m] = least[a] > leasts[m] ? least[a] : leasts[m];
        }
    }
    NAME(steps)(mosts, leasts, lanes, scaling);
}

/* Numbers of int8, each in a word, in which no other bit is set: those may be another row's. Steps
   are at least 0, but of a number that is not finite anything. */
INLINE words NAME(stepped)(floats v, floats inverse, floats shift)
{
    const ints steps = __builtin_convertvector(v * inverse + shift, ints);
    return (words)((steps | ~(steps < 256)) & 255);
}

static TARGET void NAME(quantize)(const float *x, int64_t ldx, int64_t rows, int64_t in,
                                  uint8_t *to, int64_t packed, const Scaling *scaling)
{
    for (int64_t m = 0; m < rows; m++, x += ldx, to += 4 * packed) {
        const float inverse = scaling->inverses[m], shift = scaling->shifts[m];
        for (int64_t k = 0; k < in; k++) {
            const int32_t steps = (int32_t)(x[k] * inverse + shift); /* at least 0 */
            to[k] = (uint8_t)(steps > 255 ? 255 : steps);
        }
        memset(to + in, 0, 4 * packed - in);
    }
}

/* Inputs begin .. end of rows of floats -> planes of nv vectors. The words that are transposed hold
   the numbers of nv rows for one input. */
INLINE void NAME(enter_planes)(const int nv, const float *rows, int64_t ldx, int64_t n,
                               int64_t begin, int64_t end, char *x, const Scaling *scaling)
{
#define TURN4(q) q, q + 4, q + 8, q + 12
#define TURN(q) TURN4(q), TURN4(q + 1), TURN4(q + 2), TURN4(q + 3)
    float padded[4 * LANES * LANES];
    for (int64_t k = begin; k < end; k += LANES) {
        const int64_t count = min64(LANES, end - k);
        const float *from = rows + k;
        int64_t ld = ldx;
        words some[LANES];
        if (count < LANES || n < nv * LANES) { /* what is not there becomes 0 */
            memset(padded, 0, nv * LANES * BYTES);
            for (int64_t m = 0; m < n; m++) memcpy(padded + m * LANES, from + m * ldx, 4 * count);
            from = padded, ld = LANES;
        }
        UNROLL for (int m = 0; m < LANES; m++) {
            some[m] = (words){0};
            UNROLL for (int v = 0; v < nv; v++) {
                const int64_t row = v * LANES + m;
                const floats numbers = *(const floats *)(from + row * ld);
                some[m] |= NAME(stepped)(numbers, scaling->inverses[row] - (floats){0},
                                         scaling->shifts[row] - (floats){0}) << 8 * v;
            }
        }
        FLOATS(transpose_block)((FLOATS(vec) *)some);
        for (int64_t j = 0; j < count; j++)
            if (nv == 1) {
                NARROW(x + (k + j) * LANES, some[j]);
            } else
                STORE_WORDS(x + (k + j) * BYTES, SHUFFLE8(TURN, some[j], some[j]));
    }
#undef TURN
#undef TURN4
}
#endif

#if PER_WORD == 4
static TARGET void NAME(enter)(const float *rows, int64_t ldx, int64_t n, int64_t begin,
                               int64_t end, const WordLayer *l, char *x, int64_t lanes,
                               const Scaling *scaling)
{
    if (!l->planes)
        FLOATS(transpose)(rows + begin, ldx, n, end - begin, (float *)x + begin * lanes, lanes,
                          lanes);
    else if (lanes == LANES)
        NAME(enter_planes)(1, rows, ldx, n, 4 * begin, min64(l->in, 4 * end), x, scaling);
    else
        NAME(enter_planes)(4, rows, ldx, n, 4 * begin, min64(l->in, 4 * end), x, scaling);
}
#else
static TARGET void NAME(enter)(const float *rows, int64_t ldx, int64_t n, int64_t begin,
                               int64_t end, const WordLayer *l, char *x, int64_t lanes,
                               const Scaling *scaling)
{
    float some[LANES * 8 * PER_WORD * LANES];
    (void)scaling;
    if (!l->planes) {
        FLOATS(transpose)(rows + begin, ldx, n, end - begin, (float *)x + begin * lanes, lanes,
                          lanes);
        return;
    }
    for (int64_t k = begin; k < end; k += LANES) {
        const int64_t count = min64(LANES, end - k);
        FLOATS(transpose)(rows + k, ldx, n, count, some, lanes, lanes);
        for (int64_t j = 0; j < count; j++)
            for (int64_t m = 0; m < lanes; m += 2 * LANES)
                NAME(put)(2, 1, (const words *)(some + j * lanes + m),
                          x + 4 * (k + j) * lanes + 2 * m, 2 * lanes);
    }
}
#endif

/* acc (outputs, nv) += the first `outputs` outputs of a block row for nv vectors of the batch. One
   output is taken in two chains, to hide the latency of its additions. */
INLINE void NAME(products)(const int outputs, const int nv, const int planes, const WordRow *row,
                           int64_t R, const char *weights, const char *x, SUMS *sums)
{
    enum { MOST = 4 };
    const int chains = outputs == 1 ? 2 : 1;
    const int in_part = planes && PER_WORD == 2 && row->count % 2; /* whether a word is not full */
    const int64_t groups = row->count / PER_WORD + (!in_part && row->count % PER_WORD);
    SUMS acc[2 * MOST * 2 * PER_WORD];
    words xs[2 * PER_WORD];
    int64_t g = 0;
    UNROLL for (int a = 0; a < chains * outputs * nv; a++) acc[a] = (SUMS){0};
#define ADD(chain, weight)                                                                         \
    UNROLL for (int o = 0; o < outputs; o++) {                                                     \
        const words w = (words){0} + (weight);                                                     \
        UNROLL for (int v = 0; v < nv; v++)                                                        \
            acc[((chain) * outputs + o) * nv + v] =                                                \
                DOT(acc[((chain) * outputs + o) * nv + v], w, xs[v]);                              \
    }
#define GROUP(chain, g)                                                                            \
    {                                                                                              \
        NAME(get)(nv, planes, row->inputs + (g) * (planes ? PER_WORD : 1), PER_WORD, x, xs);       \
        ADD(chain, ((const Word *)weights)[(g) * R + o])                                           \
    }
    for (; g + chains <= groups; g += chains)
        UNROLL for (int j = 0; j < chains; j++) GROUP(j, g + j)
    for (; chains > 1 && g < groups; g++)
        GROUP(0, g)
    if (in_part) { /* numbers that are not there might be anything, even NaN: they count as 0 */
        NAME(get)(nv, 1, row->inputs + g * PER_WORD, 1, x, xs);
        UNROLL for (int o = 0; o < outputs; o++) {
            Word last = 0;
            memcpy(&last, weights + 4 * (g * R + o), sizeof(NUMBER));
            const words w = (words){0} + last;
            UNROLL for (int v = 0; v < nv; v++)
                acc[o * nv + v] = DOT(acc[o * nv + v], w, xs[v]);
        }
    }
#undef GROUP
#undef ADD
    UNROLL for (int a = 0; a < outputs * nv; a++) {
        sums[a] = acc[a];
        if (chains > 1)
            sums[a] += acc[outputs * nv + a];
    }
}

#if PER_WORD == 2
/* The nearest bf16, or the even one of two, in the upper half of each word; NaN stays NaN. */
INLINE words NAME(rounded)(floats v)
{
    const words bits = (words)v, near = bits + 0x7fff + (bits >> 16 & 1);
    const words is_nan = (words)(v != v);
    return (near & ~is_nan) | ((bits | 0x400000) & is_nan);
}
#endif

/* `left` numbers of the bias from `first` on. */
INLINE floats NAME(bias_of)(const WordLayer *l, int64_t first, int64_t left)
{
#if PER_WORD == 2
    NAME(numbers) bias = {0};
    memcpy(&bias, (const NUMBER *)l->bias + first, left * sizeof(NUMBER));
    return (floats)(__builtin_convertvector(bias, words) << 16);
#else
    floats bias = {0};
    memcpy(&bias, (const float *)l->bias + first, left * 4);
    return bias;
#endif
}

/* The outputs from `first` on, LANES of them or as many as there are, for `rows` rows. */
static TARGET void NAME(finish_rows)(const WordLayer *l, int64_t first, const SUMS *sums, int rows,
                                     const Scaling *scaling, char *y, int64_t ldy)
{
    const int64_t left = min64(LANES, l->out - first);
    floats bias = {0};
    if (l->bias)
        bias = NAME(bias_of)(l, first, left);
#if PER_WORD == 4
    ints totals = {0};
    floats scales = {0};
    memcpy(&totals, l->totals + first, left * 4);
    memcpy(&scales, l->scales + first, left * 4);
#endif
    for (int m = 0; m < rows; m++, y += ldy) {
#if PER_WORD == 2
        floats v = sums[m] + bias;
        v = l->relu ? RELU(v) : v;
        const words bits = NAME(rounded)(v) >> 16;
        NAME(numbers) numbers = __builtin_convertvector(bits, NAME(numbers));
        if (left % 2) /* the next layer reads whole words, with a weight of 0, which NaN survives */
            numbers[left] = 0;
        memcpy(y + 2 * first, &numbers, (left + left % 2) * 2);
#else
        floats v = __builtin_convertvector(sums[m] - totals * scaling->zeros[m], floats) *
                       (scales * scaling->scales[m]) + bias;
        v = l->relu ? RELU(v) : v;
        memcpy(y + 4 * first, &v, left * 4);
#endif
    }
    (void)scaling;
}

/* Outputs o .. o + outputs of a layer from their sums. */
INLINE void NAME(finish)(const int outputs, const int nv, const WordLayer *l, int64_t o,
                         const SUMS *sums, const Scaling *scaling, char *y)
{
    UNROLL for (int a = 0; a < outputs; a++) {
        floats v[2 * PER_WORD];
        UNROLL for (int j = 0; j < nv; j++) {
#if PER_WORD == 2
            (void)scaling;
            v[j] = sums[a * nv + j];
#else
            const ints zero = *(const ints *)(scaling->zeros + j * LANES);
            const floats scale = *(const floats *)(scaling->scales + j * LANES);
            v[j] = __builtin_convertvector(sums[a * nv + j] - zero * l->totals[o + a], floats) *
                   (scale * l->scales[o + a]);
#endif
            if (l->bias)
                v[j] += NAME(bias_of)(l, o + a, 1)[0];
            v[j] = l->relu ? RELU(v[j]) : v[j];
        }
#if PER_WORD == 2
        UNROLL for (int u = 0; u < nv / 2; u++) {
            const words low = NAME(rounded)(v[2 * u]), high = NAME(rounded)(v[2 * u + 1]);
            STORE_WORDS(y + (a * nv / 2 + u) * BYTES, SHUFFLE16(UNZIP_HI16, low, high));
        }
#else
        UNROLL for (int j = 0; j < nv; j++) STORE_WORDS(y + (a * nv + j) * BYTES, (words)v[j]);
#endif
    }
}

INLINE void NAME(outputs_of)(const int nv, const int planes, const WordLayer *l, int64_t begin,
                             int64_t end, const char *x, const Scaling *scaling, char *y)
{
    enum { SIZE = PER_WORD == 2 ? 2 : 4, MOST = LANES == 16 ? 4 : 2 };
    for (int64_t i = begin; i < end; i++) {
        const WordRow row = row_of(l, i);
        const int64_t inside = min64(l->R, l->out - i * l->R);
        for (int64_t r = 0; r < inside;) {
            SUMS sums[MOST * 2 * PER_WORD];
            const char *weights = row.weights + 4 * r;
            char *to = y + ((i - begin) * l->R + r) * nv * LANES * SIZE;
#define SOME(n)                                                                                    \
    {                                                                                              \
        NAME(products)(n, nv, planes, &row, l->R, weights, x, sums);                               \
        NAME(finish)(n, nv, l, i * l->R + r, sums, scaling, to);                                   \
        r += n;                                                                                    \
    }
            if (MOST == 4 && inside - r >= 4)
                SOME(4)
            else if (inside - r >= 2)
                SOME(2)
            else
                SOME(1)
#undef SOME
        }
    }
}

static TARGET void NAME(outputs)(const WordLayer *l, int64_t begin, int64_t end, const char *x,
                                 int64_t lanes, const Scaling *scaling, char *y)
{
#define TILE_OF(nv)                                                                                \
    if (lanes == (nv) * LANES) {                                                                   \
        if (l->planes)                                                                             \
            NAME(outputs_of)(nv, 1, l, begin, end, x, scaling, y);                                 \
        else                                                                                       \
            NAME(outputs_of)(nv, 0, l, begin, end, x, scaling, y);                                 \
    }
    TILE_OF(PER_WORD)
    TILE_OF(PER_WORD == 2 ? 4 : 1)
#undef TILE_OF
}

/* A register tile: LANES outputs of block row i from r0 for `rows` rows of the batch, x as it
   comes. A vector of words is made of rows of a block as it is stored, and meets broadcast inputs.
   Few rows are too few sums to hide the latency of an addition: each is then taken in chains. */
INLINE void NAME(tile)(const int rows, const WordLayer *l, int64_t i, int64_t r0, const char *x,
                       int64_t ldx, const Scaling *scaling, char *y, int64_t ldy)
{
    const int chains = rows >= 8 ? 1 : rows >= 4 ? 2 : 4;
    const int64_t R = l->R, C = l->C;
    SUMS acc[16];
    UNROLL for (int a = 0; a < chains * rows; a++) acc[a] = (SUMS){0};
    for (int64_t n = l->crow[i]; n < l->crow[i + 1]; n++) {
        const int64_t k = l->col[n] * C, inside = min64(C, l->in - k);
        const NUMBER *w = (const NUMBER *)l->values + n * C * R + r0;
        const char *p[6];
        int64_t c = 0;
        UNROLL for (int m = 0; m < rows; m += 3) {
            p[m / 3] = x + k * sizeof(NUMBER) + m * ldx;
            __asm__("" : "+r"(p[m / 3])); /* a pointer for 3 rows: as many offsets would spill */
        }
#define ADD(j, c, count)                                                                           \
    {                                                                                              \
        words weights = WIDEN(w + (c) * R);                                                        \
        UNROLL for (int t = 1; t < (count); t++) weights |= WIDEN(w + ((c) + t) * R)               \
                                                            << 32 / PER_WORD * t;                  \
        UNROLL for (int m = 0; m < rows; m++)                                                      \
        {                                                                                          \
            Word input = 0;                                                                        \
            memcpy(&input, p[m / 3] + m % 3 * ldx + (c) * sizeof(NUMBER),                          \
                   (count) * sizeof(NUMBER));                                                      \
            acc[(j) * rows + m] = DOT(acc[(j) * rows + m], weights, (words){0} + input);           \
        }                                                                                          \
    }
        for (; c + chains * PER_WORD <= inside; c += chains * PER_WORD)
            UNROLL for (int j = 0; j < chains; j++) ADD(j, c + j * PER_WORD, PER_WORD)
        for (; chains > 1 && c + PER_WORD <= inside; c += PER_WORD)
            ADD(0, c, PER_WORD)
        for (; c < inside; c++)
            ADD(0, c, 1)
#undef ADD
    }
    SUMS sums[14];
    UNROLL for (int m = 0; m < rows; m++) {
        sums[m] = acc[m];
        UNROLL for (int j = 1; j < chains; j++) sums[m] += acc[j * rows + m];
    }
    NAME(finish_rows)(l, i * R + r0, sums, rows, scaling, y, ldy);
}

/* Block rows begin .. end of a layer whose R is a multiple of LANES: x (rows, in) -> y (rows, out),
   rows ldx and ldy bytes apart. */
static TARGET void NAME(tall)(const WordLayer *l, int64_t begin, int64_t end, const char *x,
                              int64_t ldx, const Scaling *scaling, char *y, int64_t ldy,
                              int64_t rows)
{
    enum { MOST = LANES == 16 ? 14 : 8 };
    const int64_t groups = ceil_div(rows, MOST);
    for (int64_t i = begin; i < end; i++)
        for (int64_t r0 = 0; r0 < l->R && i * l->R + r0 < l->out; r0 += LANES)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t m = rows * g / groups, size = rows * (g + 1) / groups - m;
                Scaling from = *scaling;
                if (PER_WORD == 4)
                    from.scales += m, from.zeros += m;
#define TILE(n)                                                                                    \
    case n:                                                                                        \
        if (n <= MOST)                                                                             \
            NAME(tile)(n <= MOST ? n : 1, l, i, r0, x + m * ldx, ldx, &from, y + m * ldy, ldy);    \
        break;
                switch (size) {
                    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9)
                    TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
                }
#undef TILE
            }
}

static TARGET void NAME(leave)(const char *y, int64_t lanes, int64_t first, int64_t outputs,
                               char *to, int64_t ldto, int64_t rows)
{
#if PER_WORD == 2
    float some[LANES * 2 * PER_WORD * LANES];
    for (int64_t o = 0; o < outputs; o += 2 * LANES) {
        const int64_t count = min64(LANES, ceil_div(outputs - o, 2));
        for (int64_t j = 0; j < count; j++)
            for (int64_t m = 0; m < lanes; m += 2 * LANES) {
                const char *plane = y + ((o + 2 * j) * lanes + m) * 2;
                const int alone = o + 2 * j + 1 == outputs;
                words from[2] = {LOAD_WORDS(plane)}, zipped[2];
                if (!alone)
                    from[1] = LOAD_WORDS(plane + 2 * lanes);
                NAME(zip)(from, zipped);
                STORE_WORDS(some + j * lanes + m, zipped[0]);
                STORE_WORDS(some + j * lanes + m + LANES, zipped[1]);
            }
        FLOATS(transpose)(some, lanes, count, rows, (float *)to + (first + o) / 2, ldto, count);
    }
#else
    FLOATS(transpose)((const float *)y, lanes, outputs, rows, (float *)to + first, ldto, outputs);
#endif
}

#if PER_WORD == 2
/* The dot products of `outputs` outputs with LANES / outputs inputs over a panel of the batch, of
   which `count` are wanted: values (count, R) += or =. */
INLINE void NAME(dots)(const int outputs, const char *grad, const char *x, const int32_t *inputs,
                       int64_t count, int64_t lanes, float *values, int64_t R, int first)
{
    const int across = LANES / outputs;
    floats acc[LANES];
    const char *from[LANES];
    UNROLL for (int c = 0; c < across; c++)
        from[c] = x + inputs[c < count ? c : count - 1] * lanes * 2;
    UNROLL for (int a = 0; a < LANES; a++) acc[a] = (floats){0};
    for (int64_t m = 0; m < 2 * lanes; m += BYTES) {
        words g[4];
        UNROLL for (int o = 0; o < outputs; o++) g[o] = LOAD_WORDS(grad + o * 2 * lanes + m);
        UNROLL for (int c = 0; c < across; c++) {
            const words xs = LOAD_WORDS(from[c] + m);
            UNROLL for (int o = 0; o < outputs; o++)
                acc[c * outputs + o] = DOT(acc[c * outputs + o], g[o], xs);
        }
    }
    FLOATS(transpose_block)((FLOATS(vec) *)acc);
    UNROLL for (int a = 1; a < LANES; a++) acc[0] += acc[a];
    for (int64_t c = 0; c < min64(across, count); c++)
        for (int o = 0; o < outputs; o++)
            values[c * R + o] = acc[0][c * outputs + o] + (first ? 0 : values[c * R + o]);
}

static TARGET void NAME(sddmm)(const WordGradient *s, int64_t begin, int64_t end, const char *grad,
                               const char *x, int64_t lanes, int first)
{
    const WordLayer *l = s->layer;
    for (int64_t i = begin; i < end; i++) {
        const WordRow row = row_of(l, i);
        const int64_t inside = min64(l->R, l->out - i * l->R);
        float *values = s->values + l->crow[i] * l->C * l->R;
        for (int64_t r = 0; r < inside;) {
            const int outputs = inside - r >= 4 ? 4 : 1, across = LANES / outputs;
            const char *g = grad + (i * l->R + r) * lanes * 2;
            for (int64_t j = 0; j < row.count; j += across) {
                float *to = values + j * l->R + r;
                if (outputs == 4)
                    NAME(dots)(4, g, x, row.inputs + j, row.count - j, lanes, to, l->R, first);
                else
                    NAME(dots)(1, g, x, row.inputs + j, row.count - j, lanes, to, l->R, first);
            }
            r += outputs;
        }
    }
}

static TARGET void NAME(round)(const float *from, int64_t n, uint16_t *to)
{
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        const words bits = NAME(rounded)(*(const floats *)(from + j)) >> 16;
        UNROLL for (int a = 0; a < LANES; a++) to[j + a] = (uint16_t)bits[a];
    }
    for (; j < n; j++)
        to[j] = (uint16_t)(NAME(rounded)((floats){0} + from[j])[0] >> 16);
}
#endif

#if PER_WORD == 4
/* The same for the lanes of nv vectors, from features to features. */
INLINE void NAME(reenter_of)(const int nv, const int planes, const char *y, int64_t features,
                             char *x, const Scaling *scaling)
{
    const int64_t pitch = nv * LANES * (planes ? 1 : 4);
    ints most[4];
    words least[4];
    floats inverse[4], shift[4];
    UNROLL for (int v = 0; v < nv; v++) most[v] = (ints){0}, least[v] = (words){0};
    for (int64_t k = 0; k < features; k++)
        UNROLL for (int v = 0; v < nv; v++) {
            const words bits = LOAD_WORDS(y + (k * nv + v) * BYTES);
            most[v] = MAX_INTS((ints)bits, most[v]);
            least[v] = MAX_WORDS(bits, least[v]);
        }
    NAME(steps)((int32_t *)most, (uint32_t *)least, nv * LANES, scaling);
    UNROLL for (int v = 0; v < nv; v++) {
        inverse[v] = *(const floats *)(scaling->inverses + v * LANES);
        shift[v] = *(const floats *)(scaling->shifts + v * LANES);
    }
    for (int64_t k = 0; k < features; k += 4) {
        words to[4];
        UNROLL for (int v = 0; v < nv; v++) to[v] = (words){0};
        UNROLL for (int t = 0; t < 4; t++) if (k + t < features)
            UNROLL for (int v = 0; v < nv; v++) {
                const floats number = *(const floats *)(y + ((k + t) * nv + v) * BYTES);
                to[v] |= NAME(stepped)(number, inverse[v], shift[v]) << 8 * t;
            }
        NAME(put)(nv, planes, to, x + k * pitch / (planes ? 1 : 4), pitch);
    }
}

static TARGET void NAME(reenter)(const char *y, int64_t features, int64_t lanes, int planes,
                                 char *x, const Scaling *scaling)
{
    if (lanes == LANES && planes)
        NAME(reenter_of)(1, 1, y, features, x, scaling);
    else if (lanes == LANES)
        NAME(reenter_of)(1, 0, y, features, x, scaling);
    else if (planes)
        NAME(reenter_of)(4, 1, y, features, x, scaling);
    else
        NAME(reenter_of)(4, 0, y, features, x, scaling);
}
#endif

#if PER_WORD == 2
static TARGET void NAME(reenter)(const char *y, int64_t features, int64_t lanes, int planes,
                                 char *x, const Scaling *scaling)
{
    (void)scaling;
    if (planes)
        memcpy(x, y, 2 * features * lanes);
    for (int64_t k = 0; k < features && !planes; k += 2)
        for (int64_t m = 0; m < 2 * lanes; m += BYTES) {
            words from[2] = {LOAD_WORDS(y + 2 * k * lanes + m)}, to[2];
            if (k + 1 < features)
                from[1] = LOAD_WORDS(y + 2 * (k + 1) * lanes + m);
            NAME(zip)(from, to);
            STORE_WORDS(x + 2 * k * lanes + 2 * m, to[0]);
            STORE_WORDS(x + 2 * k * lanes + 2 * m + BYTES, to[1]);
        }
}
#endif

/* Ends one inclusion. */
#undef NAME
#undef FLOATS
#undef TARGET
#undef LANES
#undef PER_WORD
#undef DOT
#undef ADD_PAIRS
#undef WIDEN
#undef BYTES
#undef words
#undef ints
#undef floats
#undef NUMBER
#undef SUMS
#undef LOAD_WORDS
#undef STORE_WORDS
#undef RELU
#undef INLINE
#undef UNROLL
#undef PAIR16
#undef EVEN16
#undef FOUR8
#undef ZIP_LO16
#undef ZIP_HI16
#undef UNZIP_LO16
#undef UNZIP_HI16
#undef PAIR8
#undef ZIP_LO8
#undef ZIP_HI8
#undef EVEN8
#undef UNZIP_LO8
#undef UNZIP_HI8
#undef MAX_INTS
#undef NARROW
#undef MAX_WORDS
#undef LARGER
#undef EACH_QUAD
#undef SHUFFLE16
#undef SHUFFLE8
