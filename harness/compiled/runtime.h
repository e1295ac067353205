/* What each compiled kernel includes: access checks, the log of accesses that races are found in, narrow floats.
 *
 * A launch runs its programs one after another in one thread. Every function that can fail returns nonzero and leaves
 * what it found in launch->fault; the caller returns at once. Nothing has to be released: tensors are static arrays.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { uint64_t begin, end; uint32_t argument, shared; } Extent; /* shared: the kernel may write there */

enum { LOAD = 1, STORE, ATOMIC, DIVISIBILITY, CONTIGUITY, ASSERTION, RACE, INTERRUPTED, NO_MEMORY };

typedef struct {
    int64_t kind, site, other_site, program, other_program, dim, promised, lane, found;
    uint64_t address, size;
} Fault;

typedef struct {
    const Extent *extents, *unordered;
    int64_t count, unordered_count, programs;
    int (*poll)(void); /* nonzero if a signal handler has raised */
    Fault fault;
} Launch;

/* The log: one entry for each run of adjacent accesses of one kind by one line of one program. */

enum { READ, WRITE, REWRITE, RELAXED, ORDERED }; /* REWRITE: memory held the value already; the last two are atomic */

typedef struct { uint64_t begin, end, first, last; int64_t program; int32_t site, kind; } Entry;

static Entry *entries;
static size_t used, room;
static uint64_t moment;   /* counts accesses, so that those of one program have an order */
static int64_t program_number;
static int is_logging;

static Entry open_runs[SITES];

static int close_run(Launch *launch, int site)
{
    Entry *run = &open_runs[site];
    if (run->begin == run->end)
        return 0;
    if (used == room) {
        size_t more = room ? 2 * room : 4096;
        Entry *grown = realloc(entries, more * sizeof *grown);
        if (!grown) {
            launch->fault.kind = NO_MEMORY;
            return 1;
        }
        entries = grown;
        room = more;
    }
    entries[used++] = *run;
    run->begin = run->end = 0;
    return 0;
}

static int note(Launch *launch, uint64_t address, uint64_t size, int site, int kind)
{
    Entry *run = &open_runs[site];
    moment++;
    if (run->begin != run->end && run->kind == kind) {
        if (address == run->end) {
            run->end += size;
            run->last = moment;
            return 0;
        }
        if (run->begin <= address && address + size <= run->end) {
            run->last = moment;
            return 0;
        }
    }
    if (close_run(launch, site))
        return 1;
    *run = (Entry){address, address + size, moment, moment, program_number, site, kind};
    return 0;
}

/* Returns the extent that has the bytes, or NULL with a fault. Several extents may: an argument given twice. */
static __attribute__((noinline)) const Extent *search(Launch *launch, uint64_t address, uint64_t size, int site, int kind)
{
    const Extent *found = NULL;
    for (int64_t number = 0; number < launch->count; number++) {
        const Extent *extent = &launch->extents[number];
        if (extent->begin <= address && address + size <= extent->end && (!found || extent->shared))
            found = extent;
    }
    if (!found)
        launch->fault = (Fault){.kind = kind, .site = site, .program = program_number, .address = address, .size = size};
    return found;
}

static const Extent *last_extents[SITES];

/* Checks one access; ``last`` is the extent of the one before it at this line. */
static inline int reach(Launch *launch, uint64_t address, uint64_t size, int site, int kind, const Extent **last)
{
    const Extent *extent = *last;
    if (__builtin_expect(!extent || address < extent->begin || address + size > extent->end, 0)) {
        extent = search(launch, address, size, site, kind);
        if (!extent)
            return 1;
        *last = extent;
    }
    return 0;
}

static inline int reads(Launch *launch, uint64_t address, uint64_t size, int site, const Extent **last)
{
    if (reach(launch, address, size, site, LOAD, last))
        return 1;
    return is_logging && (*last)->shared ? note(launch, address, size, site, READ) : 0;
}

static inline int writes(Launch *launch, uint64_t address, uint64_t size, int site, const Extent **last, const void *value)
{
    if (reach(launch, address, size, site, STORE, last))
        return 1;
    if (!is_logging)
        return 0;
    return note(launch, address, size, site, memcmp((const void *)address, value, size) ? WRITE : REWRITE);
}

static inline int updates(Launch *launch, uint64_t address, uint64_t size, int site, const Extent **last, int kind)
{
    if (reach(launch, address, size, site, ATOMIC, last))
        return 1;
    return is_logging ? note(launch, address, size, site, kind) : 0;
}

/* Races. */

static int by_begin(const void *one, const void *other)
{
    const Entry *a = one, *b = other;
    if (a->begin != b->begin)
        return a->begin < b->begin ? -1 : 1;
    return a->program < b->program ? -1 : a->program > b->program;
}

static int is_atomic(const Entry *entry) { return entry->kind >= RELAXED; }

/* Whether two programs synchronise between these accesses: both update one address by ordered atomic operations. */
static int are_ordered(const Entry *before, const Entry *after)
{
    for (size_t i = 0; i < used; i++) {
        const Entry *released = &entries[i];
        if (released->kind != ORDERED || released->program != before->program || released->last <= before->last)
            continue;
        for (size_t j = 0; j < used; j++) {
            const Entry *acquired = &entries[j];
            if (acquired->kind == ORDERED && acquired->program == after->program && acquired->first < after->first
                && acquired->begin < released->end && released->begin < acquired->end)
                return 1;
        }
    }
    return 0;
}

static Entry *of_programs; /* the log in the order of programs */

static int by_program(const void *one, const void *other)
{
    const Entry *a = one, *b = other;
    return a->program != b->program ? (a->program < b->program ? -1 : 1) : by_begin(one, other);
}

/* Whether a program has itself written, before it reads them, all bytes that another one has written, too. */
static int reads_its_own(const Entry *other, const Entry *read)
{
    uint64_t place = other->begin > read->begin ? other->begin : read->begin;
    uint64_t end = other->end < read->end ? other->end : read->end;
    size_t low = 0, high = used;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (of_programs[middle].program < read->program)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < used && of_programs[low].program == read->program && place < end; low++) {
        const Entry *own = &of_programs[low];
        if ((own->kind == WRITE || own->kind == REWRITE) && own->first < read->first && own->begin <= place && place < own->end)
            place = own->end;
    }
    return place >= end;
}

/* ``before`` ran earlier, and another order of the two could have given another result. */
static int is_race(const Entry *before, const Entry *after)
{
    if (before->kind == READ && after->kind == READ)
        return 0;
    if (is_atomic(before) && is_atomic(after))
        return 0;
    if (after->kind == REWRITE || (before->kind == REWRITE && after->kind == READ))
        return 0; /* memory held the value already */
    if (before->kind == WRITE && after->kind == READ && reads_its_own(before, after))
        return 0; /* and it wrote the same value: otherwise the two writes are a race */
    return !are_ordered(before, after);
}

/* The first address that both accesses have, outside of memory that is unordered; 0 if there is none. */
static uint64_t contended(const Launch *launch, const Entry *one, const Entry *other)
{
    uint64_t begin = one->begin > other->begin ? one->begin : other->begin;
    uint64_t end = one->end < other->end ? one->end : other->end;
    for (int64_t number = 0; number < launch->unordered_count; number++) {
        const Extent *extent = &launch->unordered[number];
        if (extent->begin <= begin && begin < extent->end)
            begin = extent->end;
    }
    return begin < end ? begin : 0;
}

static int find_race(Launch *launch)
{
    uint64_t begin = UINT64_MAX, end = 0;
    for (size_t i = 0; i < used; i++)
        if (entries[i].kind != READ) {
            begin = entries[i].begin < begin ? entries[i].begin : begin;
            end = entries[i].end > end ? entries[i].end : end;
        }
    size_t kept = 0;
    for (size_t i = 0; i < used; i++)
        if (entries[i].begin < end && begin < entries[i].end)
            entries[kept++] = entries[i];
    used = kept;
    free(of_programs);
    of_programs = malloc((used + 1) * sizeof *of_programs);
    if (!of_programs) {
        launch->fault.kind = NO_MEMORY;
        return 1;
    }
    memcpy(of_programs, entries, used * sizeof *entries);
    qsort(of_programs, used, sizeof *of_programs, by_program);
    qsort(entries, used, sizeof *entries, by_begin);
    for (size_t i = 0; i < used; i++)
        for (size_t j = i + 1; j < used && entries[j].begin < entries[i].end; j++) {
            const Entry *one = &entries[i], *other = &entries[j];
            if (one->program == other->program)
                continue;
            const Entry *before = one->program < other->program ? one : other;
            const Entry *after = before == one ? other : one;
            uint64_t address = contended(launch, one, other);
            if (address && is_race(before, after)) {
                launch->fault = (Fault){.kind = RACE, .site = after->site, .other_site = before->site,
                                        .program = after->program, .other_program = before->program,
                                        .address = address, .found = after->kind, .promised = before->kind};
                return 1;
            }
        }
    return 0;
}

/* Promises. ``pointers`` [shape], row-major. A cell that continues the one before it in ``dim`` promises nothing. */
static int keeps(Launch *launch, int site, int kind, const uint64_t *pointers, int dims, const int64_t *shape,
                 const int64_t *values, int64_t size)
{
    int64_t cells = 1, stride;
    for (int dim = 0; dim < dims; dim++)
        cells *= shape[dim];
    stride = cells;
    for (int dim = 0; dim < dims; dim++) {
        stride /= shape[dim];
        for (int64_t cell = 0; cell < cells; cell++) {
            int64_t place = cell / stride % shape[dim];
            int64_t beyond = kind == DIVISIBILITY ? (int64_t)(pointers[cell] % (uint64_t)values[dim]) : place % values[dim];
            if (beyond && !(place && pointers[cell] - pointers[cell - stride] == (uint64_t)size)) {
                launch->fault = (Fault){.kind = kind, .site = site, .program = program_number, .dim = dim,
                                        .promised = values[dim], .lane = cell, .found = beyond};
                return 1;
            }
        }
    }
    return 0;
}

static inline int pause_for_signals(Launch *launch)
{
    static uint32_t ticks;
    if (__builtin_expect(++ticks & 0x3FF, 1) || !launch->poll())
        return 0;
    launch->fault.kind = INTERRUPTED;
    return 1;
}

/* Numbers. Narrow floats are kept as bits and computed with as floats. */

static inline float f32_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline double f64_of(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline uint64_t bits_of_f64(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }

static inline float widen_bf16(uint16_t bits) { return f32_of((uint32_t)bits << 16); }
static inline uint16_t narrow_bf16(float x)
{
    uint32_t bits = bits_of(x);
    return x != x ? 0x7FFF : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* A float with ``mantissa`` bits and the given bias, which has subnormals; infinities and NaN are the caller's. */
static inline float widen_small(uint32_t code, int mantissa, int bias)
{
    uint32_t fraction = code & ((1u << mantissa) - 1), exponent = code >> mantissa;
    return exponent ? f32_of((exponent + 127 - bias) << 23 | fraction << (23 - mantissa))
                    : (float)fraction * f32_of((uint32_t)(127 + 1 - bias - mantissa) << 23);
}

/* The nearest code of a finite magnitude, ties to even; may be beyond the largest finite one. */
static inline uint32_t narrow_small(float magnitude, int mantissa, int bias)
{
    uint32_t bits = bits_of(magnitude), dropped = (uint32_t)(23 - mantissa);
    if (bits < (uint32_t)(127 + 1 - bias) << 23) { /* subnormal: an addition rounds to the last place */
        float magic = f32_of((uint32_t)(127 + 1 - bias - mantissa + 23) << 23);
        return bits_of(magnitude + magic) - bits_of(magic);
    }
    return ((bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped) - ((uint32_t)(127 - bias) << mantissa);
}

static inline float widen_f16(uint16_t bits)
{
    uint32_t code = bits & 0x7FFF, sign = (uint32_t)(bits & 0x8000) << 16;
    if (code >= 0x7C00)
        return f32_of(sign | 0x7F800000 | (code & 0x3FF) << 13);
    return f32_of(sign | bits_of(widen_small(code, 10, 15)));
}
static inline uint16_t narrow_f16(float x)
{
    uint32_t sign = bits_of(x) >> 16 & 0x8000;
    if (x != x)
        return 0x7FFF;
    if (fabsf(x) >= 65520.0f)
        return (uint16_t)(sign | 0x7C00);
    return (uint16_t)(sign | narrow_small(fabsf(x), 10, 15));
}

static inline float widen_f8E4M3FN(uint8_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x80) << 24;
    return (bits & 0x7F) == 0x7F ? f32_of(0x7FC00000 | sign) : f32_of(sign | bits_of(widen_small(bits & 0x7F, 3, 7)));
}
static inline uint8_t narrow_f8E4M3FN(float x)
{
    uint32_t sign = bits_of(x) >> 24 & 0x80, code;
    if (x != x)
        return 0x7F;
    code = fabsf(x) >= 448.0f ? 0x7E : narrow_small(fabsf(x), 3, 7);
    return (uint8_t)(sign | code);
}
static inline float widen_f8E5M2(uint8_t bits) { return widen_f16((uint16_t)(bits << 8)); }
static inline uint8_t narrow_f8E5M2(float x)
{
    uint32_t sign = bits_of(x) >> 24 & 0x80, code;
    if (x != x)
        return 0x7F;
    code = fabsf(x) >= 57344.0f ? 0x7B : narrow_small(fabsf(x), 2, 15);
    return (uint8_t)(sign | code);
}

/* What a GPU gives where the intermediate code leaves a result open, so that no lane can trap. */
#define DIVISIONS(bits)                                                                                                \
    static inline uint##bits##_t divs##bits(int##bits##_t a, int##bits##_t b)                                          \
    { return b == 0 ? 0 : b == -1 ? (uint##bits##_t)0 - (uint##bits##_t)a : (uint##bits##_t)(a / b); }                 \
    static inline uint##bits##_t rems##bits(int##bits##_t a, int##bits##_t b)                                          \
    { return b == 0 || b == -1 ? 0 : (uint##bits##_t)(a % b); }                                                        \
    static inline uint##bits##_t divu##bits(uint##bits##_t a, uint##bits##_t b) { return b ? a / b : 0; }              \
    static inline uint##bits##_t remu##bits(uint##bits##_t a, uint##bits##_t b) { return b ? a % b : 0; }              \
    static inline uint##bits##_t shl##bits(uint##bits##_t a, uint##bits##_t b)                                         \
    { return b < bits ? (uint##bits##_t)(a << b) : 0; }                                                                \
    static inline uint##bits##_t shru##bits(uint##bits##_t a, uint##bits##_t b) { return b < bits ? a >> b : 0; }      \
    static inline uint##bits##_t shrs##bits(int##bits##_t a, uint##bits##_t b)                                         \
    { return (uint##bits##_t)(a >> (b < bits ? b : bits - 1)); }
DIVISIONS(8)
DIVISIONS(16)
DIVISIONS(32)
DIVISIONS(64)

static inline int64_t whole(double x, double least, double most)
{
    return x != x ? 0 : x <= least ? (int64_t)least : x >= most ? (most >= 0x1p63 ? INT64_MAX : (int64_t)most) : (int64_t)x;
}
static inline uint64_t natural(double x, double most)
{
    return x != x || x <= 0 ? 0 : x >= most ? (most >= 0x1p64 ? UINT64_MAX : (uint64_t)most) : (uint64_t)x;
}

/* The sign of a zero counts in these, as on a GPU. */
static inline float maxnum(float a, float b)
{
    return a != a ? b : b != b ? a : a == b ? (bits_of(a) >> 31 ? b : a) : a > b ? a : b;
}
static inline float minnum(float a, float b)
{
    return a != a ? b : b != b ? a : a == b ? (bits_of(a) >> 31 ? a : b) : a < b ? a : b;
}
static inline float maximum(float a, float b) { return a != a ? a : b != b ? b : maxnum(a, b); }
static inline float minimum(float a, float b) { return a != a ? a : b != b ? b : minnum(a, b); }
static inline double maxnum_f64(double a, double b) { return a != a ? b : b != b ? a : a > b ? a : b; }
static inline double minnum_f64(double a, double b) { return a != a ? b : b != b ? a : a < b ? a : b; }
static inline double maximum_f64(double a, double b) { return a != a ? a : b != b ? b : maxnum_f64(a, b); }
static inline double minimum_f64(double a, double b) { return a != a ? a : b != b ? b : minnum_f64(a, b); }

/* Memory is given as numbers and may be misaligned. */
typedef uint8_t u8m __attribute__((may_alias, aligned(1)));
typedef uint16_t u16m __attribute__((may_alias, aligned(1)));
typedef uint32_t u32m __attribute__((may_alias, aligned(1)));
typedef uint64_t u64m __attribute__((may_alias, aligned(1)));
typedef float f32m __attribute__((may_alias, aligned(1)));
typedef double f64m __attribute__((may_alias, aligned(1)));
