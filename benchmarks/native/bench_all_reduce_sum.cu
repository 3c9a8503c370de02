// Checks all_reduce_sum and exchange on all GPUs of the machine (2, 4 or 8 of them, at least 2),
// then times it: back to back over many calls, replayed as graphs with one device held up, between
// two processes, and with a member that does not come.
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>

#include "graph_time.cuh"
#include "sm90/all_reduce_sum/config.h"
#include "sm90/all_reduce_sum/kernel.cuh"
#include "sm90/all_reduce_sum/launch.h"
#include "sm90/exchange/launch.h"
#include "sm90/peers/workspace.h"

using namespace flashmla;
using sm90::all_reduce_sum::kMaxMessageBytes;
using sm90::all_reduce_sum::Split;

namespace {

constexpr int64_t kGroup = 7;

// Integers whose sums bf16 holds exactly.
__host__ __device__ float value_of(uint32_t call, int rank, int64_t i) {
  return static_cast<float>((call * 31 + rank * 17 + i * 7) % 61) - 30.0f;
}

template <class Element>
__global__ void fill(const uint32_t* call, int rank, Element* x, int64_t n) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    x[i] = Element::from_float(value_of(*call, rank, i));
  }
}

// Counts wrong sums, forgets them, and begins the next call.
template <class Element>
__global__ void check(const uint32_t* call, int size, Element* out, int64_t n, uint32_t* wrong) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    float sum = 0;
    for (int rank = 0; rank < size; ++rank) sum += value_of(*call, rank, i);
    if (Element::to_float(out[i]) != sum) atomicAdd(wrong, 1);
    out[i] = Element::from_float(-1000.0f);
  }
}

// Segments of integers, each of its own sender and receiver; and those that have not come.
__global__ void fill_segments(const uint32_t* call, int rank, int size, uint32_t* x, int64_t n) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size * n;
       i += gridDim.x * blockDim.x) {
    x[i] = __float_as_uint(value_of(*call, rank, i));
  }
}

__global__ void check_segments(const uint32_t* call, int rank, int size, bool gather, uint32_t* out,
                               int64_t n, uint32_t* wrong) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size * n;
       i += gridDim.x * blockDim.x) {
    const int from = i / n;
    const int64_t at = i % n + (gather ? 0 : rank * n);
    if (out[i] != __float_as_uint(value_of(*call, from, at))) atomicAdd(wrong, 1);
    out[i] = 0;
  }
}

__global__ void next(uint32_t* call) { ++*call; }

__global__ void hold_up(const uint32_t* call, int rank, int size) {
  if (*call % (2 * size) != 2 * rank) return;
  const auto begin = sm90::peers::nanoseconds();
  while (sm90::peers::nanoseconds() - begin < 50'000) {
  }
}

struct Device {
  int rank;
  cudaStream_t stream;
  void *x, *out;
  uint32_t *call, *wrong;

  explicit Device(int device, int rank) : rank(rank) {
    CHECK(cudaSetDevice(device));
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaMalloc(&x, 4 * kMaxMessageBytes));
    CHECK(cudaMalloc(&out, 4 * kMaxMessageBytes));
    CHECK(cudaMalloc(&call, 8));
    CHECK(cudaMemset(call, 0, 8));
    wrong = call + 1;
  }

  AllReduceSumParams params(int device, DType dtype, int64_t elements) const {
    return {elements, dtype, kGroup, device, x, out};
  }

  template <class Element>
  void enqueue(int device, int size, DType dtype, int64_t n, bool skewed) {
    if (skewed) hold_up<<<1, 1, 0, stream>>>(call, rank, size);
    fill<<<64, 256, 0, stream>>>(call, rank, static_cast<Element*>(x), n);
    CHECK_STATUS(sm90::run_all_reduce_sum(params(device, dtype, n), stream));
    check<<<64, 256, 0, stream>>>(call, size, static_cast<Element*>(out), n, wrong);
    next<<<1, 1, 0, stream>>>(call);
  }

  // One or two arrays of segments, of `first` and `second` vectors of 16 bytes.
  ExchangeParams segments(int device, int size, bool gather, int64_t first, int64_t second) const {
    ExchangeParams params = {{}, second > 0 ? 2 : 1, size, gather, kGroup, device};
    params.arrays[0] = {x, out, 16 * first};
    if (second > 0) {
      params.arrays[1] = {static_cast<char*>(x) + 16 * first * size,
                          static_cast<char*>(out) + 16 * first * size, 16 * second};
    }
    return params;
  }

  void enqueue_segments(int device, int size, bool gather, int64_t first, int64_t second,
                        bool skewed) {
    if (skewed) hold_up<<<1, 1, 0, stream>>>(call, rank, size);
    const ExchangeParams params = segments(device, size, gather, first, second);
    for (int i = 0; i < params.count; ++i) {
      fill_segments<<<64, 256, 0, stream>>>(call, rank, size, (uint32_t*)params.arrays[i].x,
                                            params.arrays[i].bytes / 4);
    }
    CHECK_STATUS(sm90::run_exchange(params, stream));
    for (int i = 0; i < params.count; ++i) {
      check_segments<<<64, 256, 0, stream>>>(call, rank, size, gather,
                                             static_cast<uint32_t*>(params.arrays[i].out),
                                             params.arrays[i].bytes / 4, wrong);
    }
    next<<<1, 1, 0, stream>>>(call);
  }

  uint32_t wrong_sums() {
    CHECK(cudaStreamSynchronize(stream));
    uint32_t host[2];
    CHECK(cudaMemcpy(host, call, 8, cudaMemcpyDeviceToHost));
    return host[1];
  }
};

// The same pseudo-random calls on every device.
struct Calls {
  uint64_t state = 1;
  uint32_t random() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }

  void enqueue(Device& device, int ordinal, int size, int calls, bool skewed) {
    for (int i = 0; i < calls; ++i) {
      const DType dtype = std::array{DType::kBFloat16, DType::kFloat32, DType::kFloat16}[i % 3];
      const int64_t most = kMaxMessageBytes / itemsize(dtype);
      if (random() % 3 == 0) {  // in the same mailboxes, between sums
        const int64_t vectors = 1 + random() % (2u << (random() % 14));
        const int64_t second = random() % 2 ? 0 : 1 + random() % 2000;
        device.enqueue_segments(ordinal, size, random() % 2, vectors, second, skewed);
        continue;
      }
      // From one element to the most, small ones as often as large ones.
      const int64_t n = std::min<int64_t>(most, 1 + random() % (2u << (random() % 21)));
      if (dtype == DType::kBFloat16) {
        device.enqueue<BFloat16>(ordinal, size, dtype, n, skewed);
      } else if (dtype == DType::kFloat16) {
        device.enqueue<Float16>(ordinal, size, dtype, n, skewed);
      } else {
        device.enqueue<Float32>(ordinal, size, dtype, n, skewed);
      }
    }
  }
};

bool report(const char* what, uint32_t wrong) {
  std::printf("%s %s (%u wrong sums)\n", wrong == 0 ? "ok  " : "FAIL", what, wrong);
  std::fflush(stdout);
  return wrong == 0;
}

void open_all(int64_t group, int size, int64_t timeout_ns) {
  std::string handle;
  for (int i = 0; i < size; ++i) {
    CHECK_STATUS(sm90::open_group({group, i, i, size, 0, timeout_ns}, &handle));
  }
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      if (i != j) CHECK_STATUS(sm90::reach_member(group, i, j, j, ""));
    }
  }
}

std::vector<cudaGraphExec_t> capture(std::vector<Device>& devices,
                                     const std::function<void(int)>& enqueue) {
  std::vector<cudaGraphExec_t> graphs(devices.size());
  for (size_t i = 0; i < devices.size(); ++i) {
    CHECK(cudaSetDevice(i));
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(devices[i].stream, cudaStreamCaptureModeThreadLocal));
    enqueue(i);
    CHECK(cudaStreamEndCapture(devices[i].stream, &graph));
    CHECK(cudaGraphInstantiate(&graphs[i], graph, 0));
    CHECK(cudaGraphDestroy(graph));
  }
  return graphs;
}

void launch_all(std::vector<Device>& devices, const std::vector<cudaGraphExec_t>& graphs) {
  for (size_t i = 0; i < devices.size(); ++i) {
    CHECK(cudaSetDevice(i));
    CHECK(cudaGraphLaunch(graphs[i], devices[i].stream));
  }
}

uint32_t all_wrong(std::vector<Device>& devices) {
  uint32_t wrong = 0;
  for (size_t i = 0; i < devices.size(); ++i) {
    CHECK(cudaSetDevice(i));
    wrong += devices[i].wrong_sums();
  }
  return wrong;
}

// Both processes make the same calls; only mailboxes are shared, through IPC handles.
int check_processes() {
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0) return 1;
  const pid_t child = fork();  // before CUDA starts
  const int rank = child == 0 ? 1 : 0;
  const auto exchange = [&](const std::string& mine) {
    std::string theirs(mine.size(), '\0');
    if (write(sockets[rank], mine.data(), mine.size()) < 0) std::exit(1);
    if (read(sockets[rank], theirs.data(), theirs.size()) < 0) std::exit(1);
    return theirs;
  };
  Device device(rank, rank);
  std::string handle;
  CHECK_STATUS(sm90::open_group({kGroup, rank, rank, 2, 0, 10'000'000'000}, &handle));
  CHECK_STATUS(sm90::reach_member(kGroup, rank, 1 - rank, -1, exchange(handle)));
  exchange("x");
  Calls().enqueue(device, rank, 2, 1000, true);
  const uint32_t wrong = device.wrong_sums();
  exchange("x");
  sm90::close_group(kGroup, rank);
  if (child == 0) _exit(wrong != 0);
  int status = 1;
  waitpid(child, &status, 0);
  return report("between two processes", wrong + (status != 0)) ? 0 : 1;
}

bool check_timeout(std::vector<Device>& devices, int size) {
  constexpr int64_t kOther = 8;
  open_all(kOther, size, 50'000'000);
  CHECK(cudaSetDevice(0));
  AllReduceSumParams params = devices[0].params(0, DType::kFloat32, 100'000);
  params.group = kOther;
  CHECK(cudaMemset(devices[0].x, 0, 400'000));
  const auto begin = std::chrono::steady_clock::now();
  CHECK_STATUS(sm90::run_all_reduce_sum(params, devices[0].stream));
  CHECK(cudaStreamSynchronize(devices[0].stream));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  std::vector<float> out(100'000);
  CHECK(cudaMemcpy(out.data(), devices[0].out, 400'000, cudaMemcpyDeviceToHost));
  uint32_t finite = 0;
  for (float x : out) finite += x == x;
  const bool refused = !sm90::run_all_reduce_sum(params, devices[0].stream).ok();
  std::printf("a member that does not come: gave up after %.3f s; refused afterwards: %d\n",
              took.count(), refused);
  for (int i = 0; i < size; ++i) sm90::close_group(kOther, i);
  return report("NaN where a member does not come", finite + !refused);
}

// Microseconds a call, all devices replaying at once.
double time_graphs(std::vector<Device>& devices, int calls, const std::function<void(int)>& call) {
  const auto graphs = capture(devices, [&](int i) {
    for (int n = 0; n < calls; ++n) call(i);
  });
  std::vector<double> times;
  for (int repeat = 0; repeat < 12; ++repeat) {
    cudaEvent_t start, stop;
    CHECK(cudaSetDevice(0));
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    launch_all(devices, graphs);  // brings the devices together
    CHECK(cudaSetDevice(0));
    CHECK(cudaEventRecord(start, devices[0].stream));
    launch_all(devices, graphs);
    launch_all(devices, graphs);
    CHECK(cudaSetDevice(0));
    CHECK(cudaEventRecord(stop, devices[0].stream));
    all_wrong(devices);
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (repeat >= 3) times.push_back(ms * 1000 / (2 * calls));
  }
  for (auto graph : graphs) CHECK(cudaGraphExecDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void time_sizes(std::vector<Device>& devices, int size) {
  for (int64_t rows : {1, 4, 8, 16, 32, 64, 128}) {
    const int64_t n = rows * 7168;
    const double us = time_graphs(devices, 200, [&](int i) {
      CHECK_STATUS(
          sm90::run_all_reduce_sum(devices[i].params(i, DType::kBFloat16, n), devices[i].stream));
    });
    const Split split = sm90::all_reduce_sum::split_message(2 * n, size);
    std::printf("[%3ld, 7168] bf16 %8ld bytes: %6.2f us (%s, %d blocks)\n", rows, 2 * n, us,
                split.two_rounds ? "two rounds" : "one round", split.blocks);
    std::fflush(stdout);
  }
}

// What merging attention over context sends: 128 heads of 512 columns, and their lse.
void time_exchanges(std::vector<Device>& devices, int size) {
  for (int64_t b : {1, 2, 4}) {
    for (bool gather : {false, true}) {
      const int64_t heads = gather ? 128 : 128 / size;
      const double us = time_graphs(devices, 200, [&](int i) {
        const ExchangeParams params =
            devices[i].segments(i, size, gather, b * heads * 64, b * heads / 4);
        CHECK_STATUS(sm90::run_exchange(params, devices[i].stream));
      });
      std::printf("[%ld, 128 heads, 512] bf16 and lse, %s: %6.2f us\n", b,
                  gather ? "gathered " : "exchanged", us);
      std::fflush(stdout);
    }
    const double us = time_graphs(devices, 200, [&](int i) {
      const ExchangeParams params = devices[i].segments(i, size, true, b * 128 / size * 72, 0);
      CHECK_STATUS(sm90::run_exchange(params, devices[i].stream));
    });
    std::printf("[%ld, 128 heads, 576] bf16 queries gathered: %6.2f us\n", b, us);
  }
}

// The same messages by a given number of blocks and rounds.
void time_splits(std::vector<Device>& devices, int size) {
  using namespace sm90::all_reduce_sum;
  for (int64_t rows : {1, 16, 32, 128}) {
    for (int rounds = 1; rounds <= (size > 2 ? 2 : 1); ++rounds) {
      for (int blocks : {8, 32, 64, 96, 128}) {
        const int64_t n = rows * 7168;
        Split split = split_rounds(n / 8, size, rounds == 2);
        split.blocks = blocks;
        split.chunk = (split.segment + blocks - 1) / blocks;
        if (region_vectors(split, size) > kRegionVectors) continue;
        const double us = time_graphs(devices, 100, [&](int i) {
          Workspace workspace;
          CHECK_STATUS(find_workspace("bench", kGroup, i, &workspace));
          auto kernel = all_reduce_sum_kernel<BFloat16, 2, false>;
          if (size > 2) {
            kernel = rounds == 2 ? all_reduce_sum_kernel<BFloat16, 4, true>
                                 : all_reduce_sum_kernel<BFloat16, 4, false>;
          }
          kernel<<<blocks, kThreads, 0, devices[i].stream>>>(
              devices[i].params(i, DType::kBFloat16, n), workspace, split);
        });
        std::printf("[%3ld, 7168] rounds %d blocks %2d: %6.2f us\n", rows, rounds, blocks, us);
        std::fflush(stdout);
      }
    }
  }
}

}  // namespace

int main() {
  bool good = check_processes() == 0;
  int size = 0;
  CHECK(cudaGetDeviceCount(&size));
  size = size >= 8 ? 8 : size >= 4 ? 4 : size;
  if (size < 2) {
    std::printf("needs at least two GPUs, got %d\n", size);
    return 1;
  }
  std::vector<Device> devices;
  for (int i = 0; i < size; ++i) devices.emplace_back(i, i);
  open_all(kGroup, size, 10'000'000'000);

  std::vector<std::thread> threads;  // as a full queue of one device waits for the others
  for (int i = 0; i < size; ++i) {
    threads.emplace_back([&, i] {
      CHECK(cudaSetDevice(i));
      Calls().enqueue(devices[i], i, size, 5000, false);
    });
  }
  for (std::thread& thread : threads) thread.join();
  good &= report("5,000 calls back to back", all_wrong(devices));
  const auto graphs =
      capture(devices, [&](int i) { Calls{42}.enqueue(devices[i], i, size, 61, true); });
  for (int replay = 0; replay < 100; ++replay) launch_all(devices, graphs);
  good &= report("6,100 calls in replayed graphs, a device held up", all_wrong(devices));
  good &= check_timeout(devices, size);
  if (!good) return 1;
  time_exchanges(devices, size);
  time_sizes(devices, size);
  time_splits(devices, size);
  return 0;
}
