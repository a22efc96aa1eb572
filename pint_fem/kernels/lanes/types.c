/* Data of the kernels; every struct is mirrored by one of ctypes in Python. */
#include <stdint.h>
#include <string.h>

/* A unit lower triangular matrix of n rows by panels of adjacent columns (panels.c). A panel has its triangle, w x w by
   rows, and its rows below in tiles of four, within a tile by columns. Rows are padded by row n to whole tiles: vectors have a scratch row there. */
typedef struct {
    int n, panels;
    const int *starts, *rows;
    const int64_t *row_ptr, *triangle_ptr, *tile_ptr;
    const void *triangles, *tiles;
} Lower;

/* L D R^T */
typedef struct {
    const Lower *left, *right;
    const void *inverse_diagonal;
} Factor;

/* A sparse matrix by rows. */
typedef struct {
    int rows;
    const int *ptr, *columns;
    const void *values;
} Matrix;

/* States outside the kernels: of lane l in step s at base + l * lane + s * step, `size` numbers, the c-th of which is row
   place[c] of a vector on lanes. */
typedef struct {
    double *base;
    int64_t lane, step;
    const int *place;
    int size;
} States;

/* Two vectors a, b: x becomes x - b (a . x). */
typedef struct {
    const void *a, *b;
} Projection;

typedef struct {
    int code, out, in, object, out_row, in_row, rows, flag;
    double factor, scale;
} Operation;

enum { MULTIPLY, SOLVE, COPY, ADD, BLEND, EXCHANGE, ZERO, CLEAR_ROWS, PERMUTE, LOAD, STORE, PROJECT };

typedef struct {
    int count, vectors;
    const Operation *operations;
    void **vector; /* work arrays (rows + 1, W), which EXCHANGE swaps */
    const void *const *object; /* what operations refer to */
} Program;

typedef double Eight __attribute__((vector_size(64), aligned(8), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int64_t Choice __attribute__((vector_size(64)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Choice){__VA_ARGS__})
#endif

/* Transpose an 8 x 8 block in place. */
static inline void transpose(Eight *v) {
    Eight a[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = SHUFFLE(v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[i + 1] = SHUFFLE(v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            v[i + k] = SHUFFLE(a[i + k], a[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            v[i + k + 2] = SHUFFLE(a[i + k], a[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int k = 0; k < 4; k++) {
        a[k] = SHUFFLE(v[k], v[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        a[k + 4] = SHUFFLE(v[k], v[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    memcpy(v, a, sizeof(a));
}
