// Conversions of codes are shared by the kernels of all operations.
#pragma once

#include "sm90/formats/codes.cuh"
