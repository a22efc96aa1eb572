/* Sums over states of the products of two vectors' entries in each cell: for cell e, rows a and columns b of it,
   out[e][a][b] += factor sum_w p[rows[e][a]][w] u[columns[e][b]][w]
   with vectors on W lanes, arrays (n, W). */
#include <stdint.h>
#include <string.h>

#define W 32
#if defined(__AVX512F__)
#define LENGTH 8
#elif defined(__AVX__)
#define LENGTH 4
#else
#define LENGTH 2
#endif
#define V (W / LENGTH)
typedef double Vec __attribute__((vector_size(8 * LENGTH), aligned(8), may_alias));

#if LENGTH == 8
typedef double Half __attribute__((vector_size(32), aligned(8), may_alias));
static inline double sum_of(Vec x) {
    const Half y = *(const Half *)&x + *((const Half *)&x + 1);
    return (y[0] + y[2]) + (y[1] + y[3]);
}
#elif LENGTH == 4
static inline double sum_of(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#else
static inline double sum_of(Vec x) { return x[0] + x[1]; }
#endif

/* Write up to W states of n numbers to lanes (n + 1, W), the row n being zero. */
static void to_lanes(const double *x, int64_t state, int64_t n, int count, double *lanes) {
    if (count < W) memset(lanes, 0, sizeof(double) * W * n);
    memset(lanes + n * W, 0, sizeof(double) * W);
    for (int64_t first = 0; first < n; first += 8) {
        const int64_t last = first + 8 < n ? first + 8 : n;
        for (int w = 0; w < count; w++)
            for (int64_t i = first; i < last; i++) lanes[i * W + w] = x[w * state + i];
    }
}

/* For states number s at p + s * p_state, those of p_n numbers; rows and columns of -1 are left out. */
void cell_products(int64_t cells, int rows, int columns, const int *row, const int *column, int64_t p_n, const double *p,
                   int64_t p_state, int64_t p_one, int64_t u_n, const double *u, int64_t u_state, int64_t u_one,
                   int64_t states, double factor, double *left_lanes, double *right_lanes, double *out) {
    (void)p_one, (void)u_one;
    for (int64_t first = 0; first < states; first += W) {
        const int count = states - first < W ? (int)(states - first) : W;
        const int *r = row, *c = column;
        double *total_of = out;
        to_lanes(p + first * p_state, p_state, p_n, count, left_lanes);
        to_lanes(u + first * u_state, u_state, u_n, count, right_lanes);
        for (int64_t e = 0; e < cells; e++, r += rows, c += columns)
            for (int a = 0; a < rows; a++) {
                const Vec *x = (const Vec *)(left_lanes + (r[a] < 0 ? p_n : r[a]) * W);
                Vec left[V];
                for (int v = 0; v < V; v++) left[v] = factor * x[v];
                for (int b = 0; b < columns; b++) {
                    const Vec *y = (const Vec *)(right_lanes + (int64_t)c[b] * W);
                    Vec total = left[0] * y[0];
                    for (int v = 1; v < V; v++) total += left[v] * y[v];
                    *total_of++ += sum_of(total);
                }
            }
    }
}
