/* Machine code made from a pattern, for x86-64 with AVX-512. Included after native.h.

   A general loop loads the index of every weight, and x anew for each of them. Code made from the
   pattern has the indices in its addresses, and shares a load of x among the outputs that use it.
   Its x is (in, 16) and its y (out, 16): a panel, 16 rows of the batch transposed. A piece of code
   adds a range of inputs to a group of 28 outputs, which stay in registers:

       zmm0 .. 27 = bias, or y as the piece before left it
       for every input k that a kept weight of the group multiplies:
           zmm28 .. 31 (in turn) = x[k]
           for each such weight: zmm(output) += zmm28 * broadcast(weight)
       y = zmm0 .. 27, after the last piece max(floor, y)

   Weights are read where the layer stores them, so training changes nothing here. A piece is short
   enough for the first instruction cache, and passes over all panels before the next one does.

   Memory is written while it cannot be executed, and executed when it can no longer be written. */

#include <stddef.h>
#include <sys/mman.h>

enum {
    PANEL = 16,          /* rows of the batch in a panel: the floats of a zmm register */
    GROUP = 28,          /* outputs in registers */
    MOST_INPUTS = 512,   /* of a piece: 16 panels of them are half of the second cache ... */
    FEWER_INPUTS = 256,  /* ... and 32 panels of these, where more than LONG inputs */
    LONG = 2048,
    PIECE = 24000,       /* bytes of a piece, about */
    FEW_WEIGHTS = 512,   /* of a piece: fewer do not pay for loading and storing y */
    LINE = 64,
    AHEAD = 8 * LINE,    /* of so many bytes of code, one asks for a line of the next piece */
    MOST_WEIGHTS = 1 << 29, /* their offsets in bytes fit in 32 bits */
};

/* x (k0 .., 16), y (g0 .., 16), all the weights, bias (g0 ..), the least that an output may be, and
   the code to bring into the second cache */
typedef void (*Piece)(const float *x, float *y, const float *values, const float *bias,
                      const float *floor, const uint8_t *ahead);

struct Code {
    uint8_t *memory;
    size_t bytes, used;          /* mapped, and of instructions */
    int64_t inputs;              /* of a piece */
    int64_t blocks, groups;      /* pieces along the inputs, and along the outputs */
    uint32_t *at;                /* (blocks * groups + 1,): where a piece starts, in lines */
};

/* A pattern that code can be made from, and the code once it is made. The indices are checked, and
   outlive it. Threads may make the code at the same time: that of one of them is kept. */
struct Program {
    const int32_t *crow, *col;
    const int32_t *slots; /* NULL, or of a transposed layer: where in the values a block is */
    int64_t R, C, in, out;
    _Atomic(Code *) code;
    atomic_int refused; /* whether there was no memory for the code, or none that may be executed */
};

static void free_code(Code *code)
{
    if (!code)
        return;
    if (code->memory)
        munmap(code->memory, code->bytes);
    free(code->at);
    free(code);
}

static void free_program(Program *p)
{
    free_code(atomic_load(&p->code));
    free(p);
}

#ifdef __x86_64__

/* The arguments of a Piece, by the numbers of their registers. */
enum {
    BIAS = 1,   /* rcx */
    VALUES = 2, /* rdx */
    Y = 6,      /* rsi */
    X = 7,      /* rdi */
    FLOOR = 8,  /* r8 */
    CODE = 9,   /* r9 */
};

/* An instruction with an EVEX prefix: its opcode map (1 for 0F, 2 for 0F38), the prefix it implies
   (0 for none, 1 for 66), its opcode, and how many bytes it reads or writes. */
typedef struct {
    uint8_t map, implied, opcode, bytes;
} Instruction;

static const Instruction LOAD_ROW = {1, 0, 0x10, 64};     /* vmovups zmm, m512 */
static const Instruction STORE_ROW = {1, 0, 0x11, 64};    /* vmovups m512, zmm */
static const Instruction BROADCAST = {2, 1, 0x18, 4};     /* vbroadcastss zmm, m32 */
static const Instruction MULTIPLY_ADD = {2, 1, 0xB8, 4};  /* vfmadd231ps zmm, zmm, m32{1to16} */
static const Instruction MAXIMUM = {1, 0, 0x5F, 64};      /* vmaxps zmm, zmm, zmm */

/* The EVEX prefix and the opcode, for registers reg, second and rm (0 to 31). After 62 come
     R X B R' 0 m m m    the opcode map; bits 3 and 4 of reg, inverted, and of rm in B and X
     W v v v v 1 p p     the implied prefix; bits 0 to 3 of second, inverted
     z L L b V a a a     L = 2 for 512 bits, b for one float of memory that meets all of them; bit 4
                         of second, inverted */
static uint8_t *begin(uint8_t *p, Instruction i, int reg, int second, int rm, int one_float)
{
    *p++ = 0x62;
    *p++ = (uint8_t)((~reg & 8) << 4 | (~rm & 16) << 2 | (~rm & 8) << 2 | (~reg & 16) | i.map);
    *p++ = (uint8_t)((~second & 15) << 3 | 4 | i.implied);
    *p++ = (uint8_t)(0x40 | one_float << 4 | (~second & 16) >> 1);
    *p++ = i.opcode;
    return p;
}

/* reg, second, [base + offset]. The byte ModRM is mode, reg, base: in mode 1 an offset of 8 bits
   counts what the instruction reads, in mode 2 one of 32 bits counts bytes. */
static uint8_t *with_memory(uint8_t *p, Instruction i, int reg, int second, int base,
                            int32_t offset)
{
    const int one_float = i.opcode == MULTIPLY_ADD.opcode;
    const int32_t units = offset / i.bytes;
    p = begin(p, i, reg, second, base, one_float);
    if (offset % i.bytes == 0 && units >= -128 && units <= 127) {
        *p++ = (uint8_t)(0x40 | (reg & 7) << 3 | (base & 7));
        *p++ = (uint8_t)units;
        return p;
    }
    *p++ = (uint8_t)(0x80 | (reg & 7) << 3 | (base & 7));
    memcpy(p, &offset, 4);
    return p + 4;
}

/* reg, second, rm: mode 3 */
static uint8_t *with_registers(uint8_t *p, Instruction i, int reg, int second, int rm)
{
    p = begin(p, i, reg, second, rm, 0);
    *p++ = (uint8_t)(0xC0 | (reg & 7) << 3 | (rm & 7));
    return p;
}

/* add rdi, bytes */
static uint8_t *move_x(uint8_t *p, int32_t bytes)
{
    *p++ = 0x48, *p++ = 0x81, *p++ = 0xC0 | X;
    memcpy(p, &bytes, 4);
    return p + 4;
}

/* prefetcht1 [r9 + offset] */
static uint8_t *ask(uint8_t *p, int32_t offset)
{
    *p++ = 0x41, *p++ = 0x0F, *p++ = 0x18, *p++ = 0x80 | 2 << 3 | (CODE & 7);
    memcpy(p, &offset, 4);
    return p + 4;
}

/* The weights of a piece by input: k has the entries first[k] .. first[k + 1]. */
typedef struct {
    int32_t *first;  /* (inputs + 2,) */
    int32_t *offset; /* of the weight among the values, in bytes */
    uint8_t *output; /* of the group, 0 to 27 */
} Entries;

/* Puts the weights of `outputs` outputs from o that have the inputs k0 to k1 in the order of their
   inputs: a counting sort. next[o] is the first block of o's row that may have such inputs. */
static void sort_by_input(const struct Program *p, int64_t o, int64_t outputs, int64_t k0,
                          int64_t k1, int32_t *next, Entries *e)
{
    const int64_t R = p->R, C = p->C, size = R * C;
    memset(e->first, 0, (k1 - k0 + 2) * sizeof *e->first);
    for (int placing = 0; placing < 2; placing++) {
        for (int64_t a = 0; a < outputs; a++) {
            const int64_t i = (o + a) / R, r = (o + a) % R;
            for (int32_t n = next[a]; n < p->crow[i + 1]; n++) {
                const int64_t k = p->col[n] * C, end = min64(k + C, k1);
                if (k >= k1)
                    break;
                const int64_t block = (p->slots ? p->slots[n] : n) * size;
                for (int64_t j = max64(k, k0); j < end; j++) {
                    const int64_t c = j - k;
                    int32_t *const start = &e->first[j - k0 + 1];
                    if (!placing) {
                        start[1]++;
                        continue;
                    }
                    e->output[*start] = (uint8_t)a;
                    e->offset[(*start)++] =
                        (int32_t)(4 * (block + (p->slots ? r * C + c : c * R + r)));
                }
                if (placing && k + C <= k1)
                    next[a] = n + 1;
            }
        }
        for (int64_t j = 0; !placing && j < k1 - k0; j++)
            e->first[j + 2] += e->first[j + 1];
    }
}

/* One piece; returns where it ends. */
static uint8_t *emit(uint8_t *p, const Entries *e, int64_t inputs, int outputs, int is_first,
                     int is_last)
{
    const uint8_t *const start = p;
    int64_t at = 0; /* the input that rdi points to */
    int loads = 0, asked = 0;
    for (int a = 0; a < outputs; a++)
        p = is_first ? with_memory(p, BROADCAST, a, 0, BIAS, 4 * a)
                     : with_memory(p, LOAD_ROW, a, 0, Y, 64 * a);
    for (int64_t k = 0; k < inputs; k++) {
        if (e->first[k] == e->first[k + 1])
            continue;
        if (k - at > 127) { /* a short offset reaches 128 back and 127 on */
            p = move_x(p, (int32_t)(64 * (k + 128 - at)));
            at = k + 128;
        }
        const int x = GROUP + loads++ % 4;
        p = with_memory(p, LOAD_ROW, x, 0, X, (int32_t)(64 * (k - at)));
        for (int32_t t = e->first[k]; t < e->first[k + 1]; t++)
            p = with_memory(p, MULTIPLY_ADD, e->output[t], x, VALUES, e->offset[t]);
        if (p - start >= asked * AHEAD)
            p = ask(p, LINE * asked++);
    }
    if (is_last)
        p = with_memory(p, BROADCAST, GROUP, 0, FLOOR, 0);
    for (int a = 0; a < outputs; a++) {
        if (is_last) /* of a NaN and a number the last operand, so NaN stays NaN */
            p = with_registers(p, MAXIMUM, a, GROUP, a);
        p = with_memory(p, STORE_ROW, a, 0, Y, 64 * a);
    }
    *p++ = 0xC5, *p++ = 0xF8, *p++ = 0x77; /* vzeroupper */
    *p++ = 0xC3;                           /* ret */
    return p;
}

/* At least as many bytes as the code takes; an instruction has at most 10. */
static size_t most_bytes(const Code *c, int64_t in, int64_t weights)
{
    const int64_t pieces = c->blocks * c->groups;
    const int64_t bytes = 10 * (weights + min64(weights, in * c->groups) + in * c->groups / 128) +
                          pieces * (10 * (3 * GROUP + 2) + LINE);
    return bytes + (bytes / AHEAD + pieces) * 8;
}

/* Writes all pieces, in the order in which they run. 0, or -1 without memory. */
static int write_code(const struct Program *p, Code *c)
{
    const int64_t most = c->inputs * GROUP;
    int32_t *next = malloc(c->groups * GROUP * sizeof *next);
    Entries e = {.first = malloc((c->inputs + 2) * sizeof *e.first),
                 .offset = malloc(most * sizeof *e.offset), .output = malloc(most)};
    const int failed = !next || !e.first || !e.offset || !e.output;
    uint8_t *end = c->memory;
    for (int64_t o = 0; !failed && o < p->out; o++)
        next[o] = p->crow[o / p->R];
    for (int64_t n = 0; !failed && n < c->blocks * c->groups; n++) {
        const int64_t block = n / c->groups, o = n % c->groups * GROUP;
        const int64_t k0 = block * c->inputs, k1 = min64(p->in, k0 + c->inputs);
        const int64_t outputs = min64(GROUP, p->out - o);
        sort_by_input(p, o, outputs, k0, k1, next + o, &e);
        c->at[n] = (uint32_t)((end - c->memory) / LINE);
        end = emit(end, &e, k1 - k0, (int)outputs, block == 0, block == c->blocks - 1);
        end = c->memory + ceil_div(end - c->memory, LINE) * LINE;
    }
    c->used = end - c->memory;
    c->at[c->blocks * c->groups] = (uint32_t)(c->used / LINE);
    free(next), free(e.first), free(e.offset), free(e.output);
    return failed ? -1 : 0;
}

/* The code, or NULL where there is no memory for it, or none that may be executed. */
static Code *make_code(const struct Program *p)
{
    const int64_t weights = p->crow[ceil_div(p->out, p->R)] * p->R * p->C;
    const int64_t groups = ceil_div(p->out, GROUP);
    const int64_t bytes_of_input = 8 + ceil_div(10 * weights, groups * p->in); /* in a piece */
    const int64_t enough = FEW_WEIGHTS * groups * p->in / max64(1, weights); /* inputs */
    const int64_t cached = p->in > LONG ? FEWER_INPUTS : MOST_INPUTS;
    const int64_t most = max64(1, min64(max64(cached, enough), PIECE / bytes_of_input));
    Code *c = weights > MOST_WEIGHTS ? NULL : calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->groups = groups;
    c->blocks = ceil_div(p->in, most);
    c->inputs = ceil_div(p->in, c->blocks);
    c->blocks = ceil_div(p->in, c->inputs);
    c->bytes = most_bytes(c, p->in, weights);
    c->at = malloc((c->blocks * groups + 1) * sizeof *c->at);
    void *memory = mmap(NULL, c->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    c->memory = memory == MAP_FAILED ? NULL : memory;
    if (c->memory)
        madvise(c->memory, c->bytes, MADV_HUGEPAGE); /* fewer pages to look up; no matter if not */
    if (!c->memory || !c->at || write_code(p, c) ||
        mprotect(c->memory, c->bytes, PROT_READ | PROT_EXEC)) {
        free_code(c);
        return NULL;
    }
    return c;
}

/* The code of a program, made if this is the first to ask; NULL where it cannot be. */
static const Code *code_of(struct Program *p)
{
    Code *code = atomic_load(&p->code), *made;
    if (code || atomic_load(&p->refused))
        return code;
    made = make_code(p);
    if (!made)
        atomic_store(&p->refused, 1);
    else if (!atomic_compare_exchange_strong(&p->code, &code, made))
        free_code(made); /* another thread was first: code is its */
    else
        code = made;
    return code;
}

/* A piece, and how long it is. */
typedef struct {
    const uint8_t *start;
    int64_t size;
} Bytes;

static Bytes piece_at(const Code *c, int64_t block, int64_t group)
{
    const uint32_t *at = &c->at[block * c->groups + group];
    return (Bytes){c->memory + (int64_t)at[0] * LINE, (int64_t)(at[1] - at[0]) * LINE};
}

/* Groups begin .. end of a layer on panels: x (panels, in, 16) -> y (panels, out, 16), from panel
   to panel ldx and ldy floats. Each panel asks for a part of the next piece, within the code as far
   as that asks: many lines at once would hold up its loads of x. */
static void run_code(const Code *c, const Layer *l, int64_t begin, int64_t end, const float *x,
                     int64_t ldx, float *y, int64_t ldy, int64_t panels)
{
    static const float no_bias[GROUP];
    const float floor = l->relu ? 0 : -INFINITY;
    const int64_t groups = end - begin, pieces = c->blocks * groups;
    Bytes now = piece_at(c, 0, begin), next;
    for (int64_t n = 0; n < pieces; n++, now = next) {
        const int64_t g = begin + n % groups;
        const float *bias = l->bias ? l->bias + g * GROUP : no_bias;
        const float *from = x + n / groups * c->inputs * PANEL;
        float *to = y + g * GROUP * PANEL;
        Piece run;
        memcpy(&run, &now.start, sizeof run);
        const int64_t after = min64(n + 1, pieces - 1);
        next = piece_at(c, after / groups, begin + after % groups);
        const int64_t part = ceil_div(next.size, panels * LINE) * LINE;
        const int64_t asked = (now.size / AHEAD - 1) * LINE; /* by the code, or a line more */
        for (int64_t m = 0; m < panels; m++) {
            const uint8_t *ahead = next.start + m * part;
            for (int64_t a = max64(0, asked); a < part; a += LINE)
                __builtin_prefetch(ahead + a, 0, 2);
            run(from + m * ldx, to + m * ldy, l->values, bias, &floor, ahead);
        }
    }
}

/* Whether this process may write code and then execute it. */
static int may_execute(void)
{
    const size_t bytes = 1;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 0;
    const int may = mprotect(memory, bytes, PROT_READ | PROT_EXEC) == 0;
    munmap(memory, bytes);
    return may;
}
#endif
