/* blas_peer.c - OpenBLAS's time for the linear cases of `ruyi bench`: y = x w^T by cblas_sgemm, the same output lines.
 * Its own threads; OPENBLAS_CORETYPE chooses its kernels where it does not know the processor. */
#define _POSIX_C_SOURCE 200809L
#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    enum { ROUNDS = 5 };
    for (int i = 1; i < argc; i++) {
        int m, n, k;
        double times[ROUNDS];
        if (sscanf(argv[i], "linear.%dx%dx%d", &m, &n, &k) != 3)
            continue;
        float *x = malloc(sizeof *x * (size_t)m * (size_t)k), *w = malloc(sizeof *w * (size_t)n * (size_t)k), *y = malloc(sizeof *y * (size_t)m * (size_t)n);
        if (!x || !w || !y)
            return 3;
        for (long j = 0; j < (long)m * k; j++)
            x[j] = (float)(j % 251) / 125 - 1;
        for (long j = 0; j < (long)n * k; j++)
            w[j] = (float)(j % 241) / 120 - 1;
        for (int r = -1; r < ROUNDS; r++) {
            double start = now();
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1, x, k, w, k, 0, y, n);
            if (r >= 0)
                times[r] = now() - start;
        }
        qsort(times, ROUNDS, sizeof *times, by_size);
        printf("%s\t%.4f\t%.4f\t%.4f\t%.1f\n", argv[i], times[ROUNDS / 2], times[0], times[ROUNDS - 1], 2e-9 * m * n * k);
        free(x), free(w), free(y);
    }
    return 0;
}
