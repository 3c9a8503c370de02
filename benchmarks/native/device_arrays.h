// Arrays of one check or shape on the device, which go together, and the random numbers for them.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "checked.h"

struct DeviceArrays {
  std::mt19937 random{7};
  std::vector<void*> allocations;

  // Filled with 0xff: NaN in every type.
  void* alloc(size_t bytes) {
    void* d;
    CHECK(cudaMalloc(&d, std::max<size_t>(bytes, 16)));
    CHECK(cudaMemset(d, 0xFF, std::max<size_t>(bytes, 16)));
    allocations.push_back(d);
    return d;
  }

  template <typename V>
  V* upload(const std::vector<V>& v) {
    V* d = static_cast<V*>(alloc(v.size() * sizeof(V)));
    CHECK(cudaMemcpy(d, v.data(), v.size() * sizeof(V), cudaMemcpyHostToDevice));
    return d;
  }

  template <typename V>
  static std::vector<V> download(const void* d, size_t n) {
    std::vector<V> v(n);
    CHECK(cudaMemcpy(v.data(), d, n * sizeof(V), cudaMemcpyDeviceToHost));
    return v;
  }

  template <typename V>
  static std::vector<V> download(const V* d, size_t n) {
    return download<V>(static_cast<const void*>(d), n);
  }

  void release() {
    for (void* d : allocations) CHECK(cudaFree(d));
    allocations.clear();
  }

  int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }
};
