/* What each compiled kernel includes: access checks, the log of accesses that races are found in, promises, signals.
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

