// What Hopper adds to PTX, one function an instruction: barriers that count bytes, copies by TMA, products of warpgroups.
#pragma once

#include "primitives.cuh"
#include "tensor_map.h"

namespace fasttx::cuda {

// Barriers lie in shared memory, 8 bytes each.
__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialisation known to copies; other threads need a barrier too.
__device__ __forceinline__ void fence_barrier_inits() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for so many bytes.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the barrier's phase of this parity, its current or its last one, is complete.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
  do {
    asm volatile(
        "{\n.reg .pred complete;\nmbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n}"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (complete == 0);
}
// Of `threads` threads, whole warps; 0 is __syncthreads's.
template <int number, int threads>
__device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync %0, %1;" ::"n"(number), "n"(threads) : "memory");
}

// Begins to copy a box; its bytes count at the barrier.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, const int (&at)[4], uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::
          "r"(to),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(barrier)
      : "memory");
}
// Orders what this thread wrote to shared memory before what is read there by products.
__device__ __forceinline__ void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The warpgroup's registers from here on; all of its warps call it.
template <int registers, bool more>
__device__ __forceinline__ void set_registers() {
  if constexpr (more) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
  }
}

// How a product finds an operand in shared memory, permuted as TMA does within 128 bytes: rows of 128 bytes, eight of them
// together. next: bytes to the next 64 columns of an operand whose rows are the steps of the product.
__device__ __forceinline__ uint64_t operand(uint32_t at, uint32_t next = 16) {
  constexpr uint64_t kEightRows = 1024 >> 4, kPermuted128 = 1;
  return (at & 0x3ffff) >> 4 | uint64_t(next >> 4) << 16 | kEightRows << 32 | kPermuted128 << 62;
}
// The operand so many bytes on.
__device__ __forceinline__ uint64_t advance(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

// Before products that use registers which were touched since the last.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define FASTTX_PART(x, j) "+f"(x[j][0]), "+f"(x[j][1]), "+f"(x[j][2]), "+f"(x[j][3])
#define FASTTX_PARTS_8(x, j)                                                                                      \
  FASTTX_PART(x, j), FASTTX_PART(x, j + 1), FASTTX_PART(x, j + 2), FASTTX_PART(x, j + 3), FASTTX_PART(x, j + 4), \
      FASTTX_PART(x, j + 5), FASTTX_PART(x, j + 6), FASTTX_PART(x, j + 7)
#define FASTTX_NAMES_32                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTTX_NAMES_64                                                                                               \
  FASTTX_NAMES_32                                                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Until all but the last n groups of products are done, of which `sums` are the results of one that is.
template <int n>
__device__ __forceinline__ void wait_products(float (&sums)[8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : FASTTX_PARTS_8(sums, 0) : "n"(n) : "memory");
}
template <int n>
__device__ __forceinline__ void wait_products(float (&sums)[16][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : FASTTX_PARTS_8(sums, 0), FASTTX_PARTS_8(sums, 8) : "n"(n) : "memory");
}

// Begin sums (64 x 8 parts) = a b^T, or += where `add`; 16 columns of a and of b (8 parts rows), whose rows lie in shared
// memory. A warp has 16 rows of the sums, laid out as mma.sync's 16 x 8 parts.
template <class T>
__device__ __forceinline__ void begin_product(float (&sums)[16][4], uint64_t a, uint64_t b, bool add);
// Begin sums (64 x 8 parts) += a b; a (64 x 16) in registers, as mma.sync takes it, b 16 rows in shared memory.
template <class T>
__device__ __forceinline__ void begin_product(float (&sums)[16][4], const uint32_t (&a)[4], uint64_t b);
template <class T>
__device__ __forceinline__ void begin_product(float (&sums)[8][4], const uint32_t (&a)[4], uint64_t b);

#define FASTTX_PRODUCTS(T, type)                                                                                        \
  template <>                                                                                                           \
  __device__ __forceinline__ void begin_product<T>(float (&sums)[16][4], uint64_t a, uint64_t b, bool add) {            \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTTX_NAMES_64                      \
                 "}, %64, %65, add, 1, 1, 0, 0;\n}"                                                                     \
                 : FASTTX_PARTS_8(sums, 0), FASTTX_PARTS_8(sums, 8)                                                     \
                 : "l"(a), "l"(b), "r"(int(add))                                                                        \
                 : "memory");                                                                                           \
  }                                                                                                                     \
  template <>                                                                                                           \
  __device__ __forceinline__ void begin_product<T>(float (&sums)[16][4], const uint32_t (&a)[4], uint64_t b) {          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTTX_NAMES_64                      \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                            \
                 : FASTTX_PARTS_8(sums, 0), FASTTX_PARTS_8(sums, 8)                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                   \
                 : "memory");                                                                                           \
  }                                                                                                                     \
  template <>                                                                                                           \
  __device__ __forceinline__ void begin_product<T>(float (&sums)[8][4], const uint32_t (&a)[4], uint64_t b) {           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTTX_NAMES_32                       \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                            \
                 : FASTTX_PARTS_8(sums, 0)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                   \
                 : "memory");                                                                                           \
  }
FASTTX_PRODUCTS(bf16, "bf16")
FASTTX_PRODUCTS(fp16, "f16")

}  // namespace fasttx::cuda
