// Marks a function that host and device compilers both compile for their side.
#pragma once

#ifdef __CUDACC__
#define FLASHMLA_HOST_DEVICE __host__ __device__
#else
#define FLASHMLA_HOST_DEVICE
#endif
