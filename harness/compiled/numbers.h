/* The arithmetic of compiled kernels. Narrow floats are kept as bits and computed with as floats. */

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
