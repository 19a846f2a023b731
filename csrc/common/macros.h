// Functions that the CPU and the CUDA code share.
//
// Functions in headers have internal linkage (`static`), and shared structs have no member functions: the CPU sources
// are compiled several times, for different instruction sets, and the linker must never merge an AVX2 copy of an
// inline function with the baseline copy that an older processor runs.
#pragma once

#if defined(__CUDACC__)
#define LSGM_HD static __host__ __device__ __forceinline__
#else
#define LSGM_HD static inline
#endif
