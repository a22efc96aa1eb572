/* Real Fourier transforms over the rows of an array, W columns at once, with scaling on the way in and out.
 *
 * REAL (float or double) and W are given by the compiler's flags. A transform of an even number N of rows is a complex one
 * of N/2 (even rows are real, odd rows imaginary parts), one of an odd N is a complex one of N. Complex transforms are
 * Stockham's: passes of radix r from one buffer to the other, in order. Each column has the same operations whatever the
 * other columns.
 */
#include <stdint.h>

typedef REAL V __attribute__((vector_size(W * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef struct { V re, im; } Z;
#define INLINE static inline __attribute__((always_inline))
#define LARGEST 64

INLINE Z add(Z a, Z b) { return (Z){a.re + b.re, a.im + b.im}; }
INLINE Z sub(Z a, Z b) { return (Z){a.re - b.re, a.im - b.im}; }
/* -i a */
INLINE Z turn(Z a) { return (Z){a.im, -a.re}; }
INLINE Z times(Z a, REAL re, REAL im) { return (Z){a.re * re - a.im * im, a.re * im + a.im * re}; }

/* One pass: transforms of length r of entries n/r * s apart, multiplied by roots of unity; roots has those of the whole
 * length, real and imaginary parts. */
INLINE void pass_of(const int r, int32_t n, int32_t s, int32_t m, const REAL *roots, const Z *x, Z *y) {
    int32_t part = n / r;
    for (int32_t p = 0; p < part; p++) {
        REAL re[LARGEST], im[LARGEST];
        for (int k = 1; k < r; k++) {
            int64_t place = (int64_t)p * k * s; /* less than m */
            re[k] = roots[2 * place];
            im[k] = roots[2 * place + 1];
        }
        for (int32_t q = 0; q < s; q++) {
            const Z *a = x + q + (int64_t)s * p;
            Z *b = y + q + (int64_t)s * r * p;
            int64_t step = (int64_t)s * part;
            if (r == 2) {
                Z u = a[0], v = a[step];
                b[0] = add(u, v);
                b[s] = times(sub(u, v), re[1], im[1]);
            } else if (r == 3) {
                const REAL h = (REAL)0.86602540378443864676;
                Z u = a[0], v = add(a[step], a[2 * step]), w = turn(sub(a[step], a[2 * step]));
                Z c = {u.re - (REAL)0.5 * v.re, u.im - (REAL)0.5 * v.im}, d = {w.re * h, w.im * h};
                b[0] = add(u, v);
                b[s] = times(add(c, d), re[1], im[1]);
                b[2 * s] = times(sub(c, d), re[2], im[2]);
            } else if (r == 4) {
                Z u = add(a[0], a[2 * step]), v = sub(a[0], a[2 * step]);
                Z w = add(a[step], a[3 * step]), z = turn(sub(a[step], a[3 * step]));
                b[0] = add(u, w);
                b[s] = times(add(v, z), re[1], im[1]);
                b[2 * s] = times(sub(u, w), re[2], im[2]);
                b[3 * s] = times(sub(v, z), re[3], im[3]);
            } else {
                int32_t each = m / r;
                for (int k = 0; k < r; k++) {
                    Z sum = a[0];
                    for (int j = 1; j < r; j++) {
                        int64_t place = (int64_t)((j * k) % r) * each;
                        sum = add(sum, times(a[j * step], roots[2 * place], roots[2 * place + 1]));
                    }
                    b[k * s] = k ? times(sum, re[k], im[k]) : sum;
                }
            }
        }
    }
}

/* A complex transform of length m = product of the radices; the buffer with the result. */
static Z *transform(int32_t m, int32_t passes, const int32_t *radices, const REAL *roots, Z *x, Z *y) {
    int32_t n = m, s = 1;
    for (int32_t i = 0; i < passes; i++) {
        int32_t r = radices[i];
        if (r == 4) pass_of(4, n, s, m, roots, x, y);
        else if (r == 2) pass_of(2, n, s, m, roots, x, y);
        else if (r == 3) pass_of(3, n, s, m, roots, x, y);
        else if (r == 5) pass_of(5, n, s, m, roots, x, y);
        else pass_of(r, n, s, m, roots, x, y);
        n /= r;
        s *= r;
        Z *t = x;
        x = y;
        y = t;
    }
    return x;
}

/* Rows are far apart, so that the processor does not foresee the next columns: they are fetched while these are used. */
INLINE void fetch(const void *row, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)row + bytes + i, 0, 2);
}

INLINE V load(const void *rows, int is_double, int64_t at, int32_t count, double scale) {
    V v = {0};
    REAL *out = (REAL *)&v;
    if (is_double) {
        const double *row = (const double *)rows + at;
        fetch(row, W * sizeof(double));
        if (count == W) for (int i = 0; i < W; i++) out[i] = (REAL)(row[i] * scale);
        else for (int i = 0; i < count; i++) out[i] = (REAL)(row[i] * scale);
    } else {
        const REAL *row = (const REAL *)rows + at;
        fetch(row, W * sizeof(REAL));
        if (count == W) for (int i = 0; i < W; i++) out[i] = row[i];
        else for (int i = 0; i < count; i++) out[i] = row[i];
    }
    return v;
}

/* rows[at ...] = v, or, where they are double precision's to be added to, += v scale. */
INLINE void store(void *rows, int is_double, int64_t at, int32_t count, double scale, const V *v) {
    const REAL *in = (const REAL *)v;
    if (is_double) {
        double *row = (double *)rows + at;
        fetch(row, W * sizeof(double));
        if (count == W) for (int i = 0; i < W; i++) row[i] += (double)in[i] * scale;
        else for (int i = 0; i < count; i++) row[i] += (double)in[i] * scale;
    } else {
        REAL *row = (REAL *)rows + at;
        fetch(row, W * sizeof(REAL));
        if (count == W) for (int i = 0; i < W; i++) row[i] = in[i];
        else for (int i = 0; i < count; i++) row[i] = in[i];
    }
}

INLINE void store_complex(REAL *row, int32_t count, const Z *z) {
    const REAL *re = (const REAL *)&z->re, *im = (const REAL *)&z->im;
    fetch(row, 2 * W * sizeof(REAL));
    if (count == W) for (int i = 0; i < W; i++) row[2 * i] = re[i], row[2 * i + 1] = im[i];
    else for (int i = 0; i < count; i++) row[2 * i] = re[i], row[2 * i + 1] = im[i];
}

INLINE Z load_complex(const REAL *row, int32_t count) {
    Z z = {{0}, {0}};
    fetch(row, 2 * W * sizeof(REAL));
    REAL *re = (REAL *)&z.re, *im = (REAL *)&z.im;
    if (count == W) for (int i = 0; i < W; i++) re[i] = row[2 * i], im[i] = row[2 * i + 1];
    else for (int i = 0; i < count; i++) re[i] = row[2 * i], im[i] = row[2 * i + 1];
    return z;
}

INLINE void forward_of(const int is_double, int32_t N, int32_t m, int32_t passes, const int32_t *radices, const REAL *roots,
                       const REAL *half, int64_t columns, int64_t stride, const void *rows, const double *scale,
                       int64_t out_stride, REAL *out, Z *x, Z *y) {
    for (int64_t c = 0; c < columns; c += W) {
        int32_t count = columns - c < W ? (int32_t)(columns - c) : W, last = N / 2;
        for (int32_t j = 0; j < m; j++) {
            int32_t i = m == N ? j : 2 * j;
            x[j].re = load(rows, is_double, i * stride + c, count, is_double ? scale[i] : 1);
            if (m == N) x[j].im = (V){0};
            else x[j].im = load(rows, is_double, (i + 1) * stride + c, count, is_double ? scale[i + 1] : 1);
        }
        Z *z = transform(m, passes, radices, roots, x, y);
        for (int32_t k = 0; k <= last; k++) {
            Z value;
            if (m == N) value = z[k];
            else {
                const Z *a = z + (k == m ? 0 : k), *b = z + (k == 0 || k == m ? 0 : m - k);
                Z even = {(a->re + b->re) * (REAL)0.5, (a->im - b->im) * (REAL)0.5};
                Z odd = {(a->im + b->im) * (REAL)0.5, (b->re - a->re) * (REAL)0.5};
                value = add(even, times(odd, half[2 * k], half[2 * k + 1]));
            }
            store_complex(out + 2 * (k * out_stride + c), count, &value);
        }
    }
}

INLINE void backward_of(const int is_double, int32_t N, int32_t m, int32_t passes, const int32_t *radices, const REAL *roots,
                        const REAL *half, int64_t columns, int64_t stride, const REAL *spectrum, const double *scale,
                        int64_t out_stride, void *out, Z *x, Z *y) {
    /* conjugates are transformed forwards */
    const REAL size = (REAL)(1.0 / m);
    for (int64_t c = 0; c < columns; c += W) {
        int32_t count = columns - c < W ? (int32_t)(columns - c) : W;
        for (int32_t k = 0; k < m; k++) {
            int32_t other = m == N ? (k > N / 2 ? N - k : k) : m - k;
            Z a = load_complex(spectrum + 2 * ((m == N ? other : k) * stride + c), count);
            if (m == N) { /* an imaginary part of frequency 0 has no effect on real parts */
                if (k <= N / 2) a.im = -a.im;
                x[k] = a;
                continue;
            }
            Z b = load_complex(spectrum + 2 * (other * stride + c), count);
            if (k == 0) a.im = b.im = (V){0};
            Z even = {(a.re + b.re) * (REAL)0.5, (a.im - b.im) * (REAL)0.5};
            Z odd = times((Z){(a.re - b.re) * (REAL)0.5, (a.im + b.im) * (REAL)0.5}, half[2 * k], -half[2 * k + 1]);
            x[k].re = even.re - odd.im;
            x[k].im = -(even.im + odd.re);
        }
        Z *z = transform(m, passes, radices, roots, x, y);
        for (int32_t j = 0; j < m; j++) {
            int32_t i = m == N ? j : 2 * j;
            V re = z[j].re * size, im = -z[j].im * size;
            store(out, is_double, i * out_stride + c, count, is_double ? scale[i] : 1, &re);
            if (m != N) store(out, is_double, (i + 1) * out_stride + c, count, is_double ? scale[i + 1] : 1, &im);
        }
    }
}

/* Spectrum of N rows: of double precision times scale, or (scale = NULL) of type REAL. */
void forward_transform(int32_t N, int32_t m, int32_t passes, const int32_t *radices, const REAL *roots, const REAL *half,
                       int64_t columns, int64_t stride, const void *rows, const double *scale, int64_t out_stride, REAL *out,
                       Z *x, Z *y) {
    if (scale) forward_of(1, N, m, passes, radices, roots, half, columns, stride, rows, scale, out_stride, out, x, y);
    else forward_of(0, N, m, passes, radices, roots, half, columns, stride, rows, scale, out_stride, out, x, y);
}

/* The way back: to rows of type REAL, or (scale given) times scale added to rows of double precision. */
void backward_transform(int32_t N, int32_t m, int32_t passes, const int32_t *radices, const REAL *roots, const REAL *half,
                        int64_t columns, int64_t stride, const REAL *spectrum, const double *scale, int64_t out_stride,
                        void *out, Z *x, Z *y) {
    if (scale) backward_of(1, N, m, passes, radices, roots, half, columns, stride, spectrum, scale, out_stride, out, x, y);
    else backward_of(0, N, m, passes, radices, roots, half, columns, stride, spectrum, scale, out_stride, out, x, y);
}

/* out += rows scale, of `count` contiguous rows. */
void add_scaled(int32_t count, int64_t columns, const REAL *rows, const double *scale, double *out) {
    for (int32_t i = 0; i < count; i++, rows += columns, out += columns) {
        int64_t c = 0;
        for (; c + W <= columns; c += W) {
            V v = *(const V *)(rows + c);
            store(out, 1, c, W, scale[i], &v);
        }
        if (c < columns) {
            V v = load(rows, 0, c, (int32_t)(columns - c), 1);
            store(out, 1, c, (int32_t)(columns - c), scale[i], &v);
        }
    }
}
