#ifndef RUNIK_CUDA_UK_H
#define RUNIK_CUDA_UK_H

/* Made by cbindgen from runtime-uk/c/src/lib.rs: UPDATE_GOLDEN=1 cargo test -p uk-c writes it. */

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

// Where memory lives.
typedef enum uk_memory_type_t {
  // Host memory that the device reaches.
  UK_MEM_HOST,
  // Device memory.
  UK_MEM_DEVICE,
  // Memory that moves to whoever touches it.
  UK_MEM_MANAGED,
} uk_memory_type_t;

// A connection to a device. Zero it before `cuda_uk_init`.
typedef struct cuda_unikernel_context_t {
  // The number given to `cuda_uk_init`.
  int device_id;
  // Null: memory is allocated piece by piece.
  void *gpu_memory_base;
  // Bytes of the device's memory.
  size_t gpu_memory_size;
  // The library's own; null before initialisation.
  void *gpu_context;
} cuda_unikernel_context_t;

// A piece of memory.
typedef struct uk_memory_allocation_t {
  // Device address.
  void *ptr;
  // Bytes.
  size_t size;
  // Where it lives.
  enum uk_memory_type_t kind;
  // Whose it is.
  struct cuda_unikernel_context_t *ctx;
} uk_memory_allocation_t;

// A kernel of the table. The broker has its code.
typedef struct uk_cuda_kernel_t {
  // Its name, for `cuda_uk_launch`.
  const char *name;
} uk_cuda_kernel_t;

// All kernels.
typedef struct uk_cuda_kernel_table_t {
  // The first.
  const struct uk_cuda_kernel_t *kernels;
  // How many.
  size_t n_kernels;
} uk_cuda_kernel_table_t;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Connects to the broker of a device: the one that listens at /run/runik-gpu-host/DEVICE_ID.
//
// # Safety
// * `ctx` points to a context, whose contents are overwritten.
int cuda_uk_init(struct cuda_unikernel_context_t *ctx, int device_id);

// Connects to the broker that listens at a unix socket.
//
// # Safety
// * `ctx` points to a context, whose contents are overwritten; `socket` to a string that ends with a NUL.
int cuda_uk_init_at(struct cuda_unikernel_context_t *ctx,
                    int device_id,
                    const char *socket);

// Ends the connection; the broker gives back all memory.
//
// # Safety
// * `ctx` is null, zeroed or initialised.
void cuda_uk_shutdown(struct cuda_unikernel_context_t *ctx);

// The words of the last failure; empty if there was none. Valid until the next call with this context.
//
// # Safety
// * `ctx` is null, zeroed or initialised.
const char *cuda_uk_error(struct cuda_unikernel_context_t *ctx);

// Device memory; null if there is none.
//
// # Safety
// * `ctx` is null, zeroed or initialised.
void *cuda_uk_malloc(struct cuda_unikernel_context_t *ctx, size_t size);

// Memory of a kind, a `uk_memory_type_t`; its `ptr` is null if there is none.
//
// # Safety
// * `ctx` is null, zeroed or initialised.
struct uk_memory_allocation_t cuda_uk_malloc_kind(struct cuda_unikernel_context_t *ctx,
                                                  size_t size,
                                                  int kind);

// Gives memory back.
//
// # Safety
// * `ctx` is null, zeroed or initialised.
void cuda_uk_free(struct cuda_unikernel_context_t *ctx, void *ptr);

// Copies to the device.
//
// # Safety
// * `ctx` is null, zeroed or initialised; `size` bytes can be read at `src`.
int cuda_uk_memcpy_htod(struct cuda_unikernel_context_t *ctx,
                        void *dst,
                        const void *src,
                        size_t size);

// Copies from the device, after all work so far.
//
// # Safety
// * `ctx` is null, zeroed or initialised; `size` bytes can be written at `dst`, and were before.
int cuda_uk_memcpy_dtoh(struct cuda_unikernel_context_t *ctx,
                        void *dst,
                        const void *src,
                        size_t size);

// The kernels whose PTX this library was built with; none if it was built without. The broker may know more.
struct uk_cuda_kernel_table_t cuda_uk_kernels(void);

// Queues a launch of a kernel: one-dimensional CTAs, arguments laid out as a C struct of them.
//
// # Safety
// * `ctx` is null, zeroed or initialised; `name` is a string that ends with a NUL; `params_bytes` bytes can be read at
//   `params`; `grid` points to three numbers.
int cuda_uk_launch(struct cuda_unikernel_context_t *ctx,
                   const char *name,
                   const uint32_t *grid,
                   uint32_t cta,
                   uint32_t smem_bytes,
                   const void *params,
                   size_t params_bytes);

// Waits for all work, and says whether it went well.
//
// # Safety
// * `ctx` is null, zeroed or initialised.
int cuda_uk_synchronize(struct cuda_unikernel_context_t *ctx);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* RUNIK_CUDA_UK_H */
