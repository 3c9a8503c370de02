// Times calls in a CUDA graph captured by hand.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "checked.h"

// Microseconds a call: the median of 9 launches of a graph of `calls` calls, after a rest, as a hot
// GPU's clock is low. Destroys the graph.
inline double time_graph(cudaGraph_t graph, int calls, cudaStream_t stream, int rest_ms = 50) {
  cudaGraphExec_t exec;
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> times;
  std::this_thread::sleep_for(std::chrono::milliseconds(rest_ms));
  for (int i = 0; i < 12; ++i) {
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaStreamSynchronize(stream));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 3) times.push_back(ms * 1000 / calls);
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// The same of the calls that run(call, stream) makes.
template <typename Run>
double time_calls(int calls, const Run& run) {
  cudaStream_t stream;
  cudaGraph_t graph;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int call = 0; call < calls; ++call) run(call, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  const double us = time_graph(graph, calls, stream);
  CHECK(cudaStreamDestroy(stream));
  return us;
}
