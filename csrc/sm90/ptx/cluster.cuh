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

// The first half of cluster_sync, whose second is cluster_wait.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// The two halves of a barrier that orders nothing but what fences before it do.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// True in one lane of the warp, of which the compiler knows that it is one.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n}\n"
      : "=r"(elected));
  return elected != 0;
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

__device__ __forceinline__ float4 load_cluster_float4(uint32_t mapped) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(mapped)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_cluster(uint32_t mapped, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(mapped), "r"(x) : "memory");
}

__device__ __forceinline__ void store_cluster(uint32_t mapped, uint2 v) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(mapped), "r"(v.x), "r"(v.y)
               : "memory");
}

// Completes 4 bytes on an mbarrier of the same block when they are there.
__device__ __forceinline__ void store_async(uint32_t mapped, uint32_t x, uint32_t mapped_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
          mapped),
      "r"(x), "r"(mapped_barrier)
      : "memory");
}

// The same for 16 bytes.
__device__ __forceinline__ void store_async(uint32_t mapped, uint4 v, uint32_t mapped_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
      " [%0], {%1, %2, %3, %4}, [%5];" ::"r"(mapped),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(mapped_barrier)
      : "memory");
}

// Arrives at an mbarrier of any block of the cluster. (With .release.cluster it would wait for all
// of the thread's accesses to global memory, too.)
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t mapped) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

// Copies bytes (a multiple of 16, as the addresses are) from this block's shared memory, and
// completes them on the mbarrier of the block they go to.
__device__ __forceinline__ void copy_to_block(uint32_t mapped, uint32_t source, uint32_t bytes,
                                              uint32_t mapped_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(mapped),
      "r"(source), "r"(bytes), "r"(mapped_barrier)
      : "memory");
}

}  // namespace flashmla::sm90
