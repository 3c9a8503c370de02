# The CUDA module. The compiler is the first of: CUDACXX (or CMAKE_CUDA_COMPILER), the nvidia-cuda-*
# packages of the Python that builds, nvcc on the PATH, /usr/local/cuda.
find_python_package(nvidia.cu13 cuda_package)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  if(EXISTS "${cuda_package}/bin/nvcc")
    set(CMAKE_CUDA_COMPILER "${cuda_package}/bin/nvcc")
  else()
    find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin)
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "Found no CUDA compiler: set CUDACXX to an nvcc, or leave the CUDA module "
      "out with FLASHMLA_CUDA=OFF (pip install . -C cmake.define.FLASHMLA_CUDA=OFF)")
  endif()
endif()

# 90a is Hopper's own instruction set (wgmma, TMA): machine code only, nothing for a driver to compile.
set(CMAKE_CUDA_ARCHITECTURES 90a-real)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

file(GLOB_RECURSE sm90_sources CONFIGURE_DEPENDS csrc/sm90/*.cu)
add_library(flashmla_sm90 OBJECT ${sm90_sources})
target_include_directories(flashmla_sm90 PRIVATE csrc)
target_compile_options(flashmla_sm90 PRIVATE --expt-relaxed-constexpr -Xptxas=-v)
# Fails where ptxas serialises wgmma or spills registers; only warns with a compiler of the user's.
set(check_ptxas "${Python_EXECUTABLE};${CMAKE_CURRENT_SOURCE_DIR}/cmake/check_ptxas.py")
if(NOT CMAKE_CUDA_COMPILER STREQUAL "${cuda_package}/bin/nvcc")
  list(APPEND check_ptxas --warn)
endif()
set_target_properties(flashmla_sm90 PROPERTIES CUDA_COMPILER_LAUNCHER "${check_ptxas}")

add_extension_module(_cuda csrc/ffi/module_cuda.cc)
target_link_libraries(_cuda PRIVATE flashmla_sm90)
target_include_directories(_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
