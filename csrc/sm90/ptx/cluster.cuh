// Blocks of a cluster: each other's shared memory, and their barrier.
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Synchronises all threads of the cluster, and makes their stores to shared memory visible to it.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The address, for the functions below, of what lies at `address` in this block, in block `rank`.
__device__ __forceinline__ uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ __forceinline__ uint32_t load_cluster(uint32_t mapped) {
  uint32_t x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(mapped) : "memory");
  return x;
}

__device__ __forceinline__ void store_cluster(uint32_t mapped, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(mapped), "r"(x) : "memory");
}

__device__ __forceinline__ void store_cluster(uint32_t mapped, uint2 v) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(mapped), "r"(v.x), "r"(v.y)
               : "memory");
}

// Arrives at an mbarrier of another block.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t mapped) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapped)
               : "memory");
}

// As mbarrier_wait, where other blocks arrive.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies bytes (a multiple of 16, as the addresses are) of this block's shared memory to another
// block's and completes them on an mbarrier there.
__device__ __forceinline__ void copy_bulk_cluster(uint32_t mapped_target, uint32_t source,
                                                  uint32_t bytes, uint32_t mapped_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(mapped_target),
      "r"(source), "r"(bytes), "r"(mapped_barrier)
      : "memory");
}

}  // namespace flashmla::sm90
