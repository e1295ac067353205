/* Finds races in the log of a launch; races.py says what is one. */

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

/* The first address from ``begin`` to ``end`` outside of memory that is unordered; 0 if there is none. */
static uint64_t ordered(const Launch *launch, uint64_t begin, uint64_t end)
{
    for (int64_t number = 0; number < launch->unordered_count; number++) {
        const Extent *extent = &launch->unordered[number];
        if (extent->begin <= begin && begin < extent->end)
            begin = extent->end;
    }
    return begin < end ? begin : 0;
}

/* The first address that both accesses have, outside of memory that is unordered; 0 if there is none. */
static uint64_t contended(const Launch *launch, const Entry *one, const Entry *other)
{
    uint64_t begin = one->begin > other->begin ? one->begin : other->begin;
    uint64_t end = one->end < other->end ? one->end : other->end;
    return ordered(launch, begin, end);
}

/* Notes the race of two entries, if they are one. */
static int are_race(Launch *launch, const Entry *one, const Entry *other)
{
    const Entry *before = one->program < other->program ? one : other;
    const Entry *after = before == one ? other : one;
    uint64_t address = contended(launch, one, other);
    if (one->program == other->program || !address || !is_race(before, after))
        return 0;
    launch->fault = (Fault){.kind = RACE, .site = after->site, .other_site = before->site, .program = after->program,
                            .other_program = before->program, .address = address, .found = after->kind,
                            .promised = before->kind};
    return 1;
}

/* Compares each entry with the writes that overlap it: reads alone may be many, and do not race.
 *
 * Entries in unordered memory are left out, since all rows of a batch may write to one padding slot. */
static int compare_with_writes(Launch *launch)
{
    static size_t *writes;       /* their places in the log, which is sorted by the beginning */
    static uint64_t *furthest;   /* for each write, where the furthest of it and those before it ends */
    size_t count = 0;
    free(writes);
    free(furthest);
    writes = malloc((used + 1) * sizeof *writes);
    furthest = malloc((used + 1) * sizeof *furthest);
    if (!writes || !furthest) {
        launch->fault.kind = NO_MEMORY;
        return 1;
    }
    for (size_t i = 0; i < used; i++)
        if (entries[i].kind != READ && ordered(launch, entries[i].begin, entries[i].end)) {
            furthest[count] = count && furthest[count - 1] > entries[i].end ? furthest[count - 1] : entries[i].end;
            writes[count++] = i;
        }
    for (size_t i = 0; i < used; i++) {
        const Entry *entry = &entries[i];
        size_t low = 0, high = count;
        if (!ordered(launch, entry->begin, entry->end))
            continue;
        while (low < high) { /* the first write that begins behind the entry */
            size_t middle = (low + high) / 2;
            if (entries[writes[middle]].begin < entry->end)
                low = middle + 1;
            else
                high = middle;
        }
        for (size_t behind = low; behind > 0 && furthest[behind - 1] > entry->begin; behind--) {
            size_t place = writes[behind - 1];
            int is_seen = entry->kind != READ && place >= i; /* as a pair in the other order */
            if (!is_seen && entries[place].end > entry->begin && are_race(launch, entry, &entries[place]))
                return 1;
        }
    }
    return 0;
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
    return compare_with_writes(launch);
}

