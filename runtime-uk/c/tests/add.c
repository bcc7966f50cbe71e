/* Adds two vectors on the device behind a broker: the whole of cuda_uk.h from C. */
#include "cuda_uk.h"

#include <stdio.h>
#include <string.h>

enum { N = 1000 };

static int fail(cuda_unikernel_context_t *ctx, const char *what) {
    fprintf(stderr, "%s: %s\n", what, cuda_uk_error(ctx));
    return 1;
}

int main(int argc, char **argv) {
    cuda_unikernel_context_t ctx;
    memset(&ctx, 0, sizeof ctx);
    if (argc != 2 || cuda_uk_init_at(&ctx, 0, argv[1]) != 0) return fail(&ctx, "init");
    float a[N], b[N], y[N];
    for (int i = 0; i < N; i++) a[i] = (float)i, b[i] = 0.5f * (float)i;
    uk_memory_allocation_t da = cuda_uk_malloc_kind(&ctx, sizeof a, UK_MEM_DEVICE);
    void *db = cuda_uk_malloc(&ctx, sizeof b), *dy = cuda_uk_malloc(&ctx, sizeof y);
    if (!da.ptr || !db || !dy) return fail(&ctx, "malloc");
    if (cuda_uk_memcpy_htod(&ctx, da.ptr, a, sizeof a) || cuda_uk_memcpy_htod(&ctx, db, b, sizeof b)) return fail(&ctx, "htod");
    /* binary_f32(a, b, ids, y, n, period, inner / 4, operation): no ids, operation 0 adds. */
    struct { void *a, *b, *ids, *y; unsigned n, period, inner, op; } params = {da.ptr, db, NULL, dy, N, N, 0, 0};
    unsigned grid[3] = {(N + 1023) / 1024, 1, 1};
    if (cuda_uk_launch(&ctx, "binary_f32", grid, 256, 0, &params, sizeof params)) return fail(&ctx, "launch");
    if (cuda_uk_synchronize(&ctx)) return fail(&ctx, "synchronize");
    if (cuda_uk_memcpy_dtoh(&ctx, y, dy, sizeof y)) return fail(&ctx, "dtoh");
    for (int i = 0; i < N; i++)
        if (y[i] != 1.5f * (float)i) return printf("y[%d] is %f\n", i, (double)y[i]), 1;
    /* What is wrong is an error, with words. */
    if (!cuda_uk_launch(&ctx, "no such kernel", grid, 32, 0, NULL, 0) || !*cuda_uk_error(&ctx)) return fail(&ctx, "a kernel that is not");
    if (!cuda_uk_memcpy_dtoh(&ctx, y, (char *)dy + sizeof y, 1)) return fail(&ctx, "a copy out of range");
    if (cuda_uk_malloc_kind(&ctx, 4, 7).ptr || !*cuda_uk_error(&ctx)) return fail(&ctx, "a kind that is not");
    if (!cuda_uk_memcpy_dtoh(NULL, y, dy, 1)) return fail(&ctx, "no context");
    cuda_uk_free(&ctx, da.ptr);
    cuda_uk_free(&ctx, db);
    cuda_uk_free(&ctx, dy);
    cuda_uk_shutdown(&ctx);
    puts("ok");
    return 0;
}
