/* Sums over states of the products of two vectors' entries in each cell: for cell e, rows a and columns b of it,
   out[e][a][b] += sum_w p[rows[e][a]][w] u[columns[e][b]][w]
   with vectors on W lanes, arrays (n, W). */
#include <stdint.h>
#include <string.h>

#define W 16
#if defined(__AVX512F__)
#define LENGTH 8
#elif defined(__AVX__)
#define LENGTH 4
#else
#define LENGTH 2
#endif
#define V (W / LENGTH)
typedef double Vec __attribute__((vector_size(8 * LENGTH), aligned(8), may_alias));

static inline double sum_of(Vec x) {
    double total = 0.0;
    for (int i = 0; i < LENGTH; i++) total += x[i];
    return total;
}

void cell_products(int64_t cells, int rows, int columns, const int *row, const int *column, const double *p, const double *u,
                   double *out) {
    for (int64_t e = 0; e < cells; e++, row += rows, column += columns)
        for (int a = 0; a < rows; a++) {
            const Vec *x = (const Vec *)(p + (int64_t)row[a] * W);
            Vec left[V];
            for (int v = 0; v < V; v++) left[v] = x[v];
            for (int b = 0; b < columns; b++) {
                const Vec *y = (const Vec *)(u + (int64_t)column[b] * W);
                Vec total = left[0] * y[0];
                for (int v = 1; v < V; v++) total += left[v] * y[v];
                *out++ += sum_of(total);
            }
        }
}
