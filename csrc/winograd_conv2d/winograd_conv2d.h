// winograd_conv2d: a 3x3 convolution with stride 1 and zeros beside the image, through Winograd's minimal filtering:
// the image is cut into tiles of m x m results, each of which reads n x n pixels, n = m + 2, and with matrices of
// constants
//
//   V = B d B^T (a tile's pixels d, per channel),   M = sum over channels of V U,   y = A^T M A + bias
//
// where U = G w G^T is the prepared weight. M takes n n multiplications per tile, channel and filter, not 9 m m.
//
// No torch.
#pragma once

#include <cstdint>

#include "common/indexing.h"
#include "common/macros.h"

namespace lsgm {
namespace winograd_conv2d {

constexpr int64_t kPanel = 32;  // filters of a panel of the prepared weight
constexpr int64_t kGroup = 16;  // channels side by side in V

// One call. x and out are channels_last.
struct Problem {
  int64_t batch, channels, height, width, filters;
  int64_t tile;         // m: 2 or 4
  const float* x;       // [batch][height][width][channels]
  const float* weight;  // [n n][panels][channels][kPanel], zeros where there is no filter
  const float* bias;    // [filters], or null
  float* out;           // [batch][height][width][filters]
  // What `plan` finds.
  int64_t lanes;               // of the registers: 16 for the AVX-512 kernels, 8 for the others
  int64_t rows, columns;       // tiles of an image
  int64_t tiles;               // of all images
  int64_t workers;             // that share the tiles, each with scratch memory of its own
  int64_t block;               // tiles at a time of a worker, whose V and M the last cache holds
  int64_t groups, panels;      // of channels, of filters
  int64_t v_stride, m_stride;  // floats between one of the n n positions and the next
  // Scratch memory. V: [n n][groups][tiles][kGroup]; M: [n n][panels][tiles][kPanel]; a pixel beside the image.
  float* v;
  float* m;
  const float* zeros;
};

// The tiles [first, first + count).
struct Block {
  int64_t first, count;
};

LSGM_HD int64_t positions(const Problem& p) { return (p.tile + 2) * (p.tile + 2); }

// `plan` chooses `lanes` by the processor, and `workers` and `block` by the shape and the number of threads; what is set
// already stays. No result depends on them. For each of a worker's blocks, the three steps are run one after the other:
// transform_input for all its tiles, multiply for all `products`, transform_output for all tiles again. Threads do the
// work of the workers, or, where there is only one, share each of the steps in ranges [begin, end).
namespace cpu {

void plan(Problem& p, int64_t threads);
int64_t scratch_size(const Problem& p);  // floats, of a worker; 64-byte alignment is best
void place(Problem& p, float* scratch);
int64_t blocks(const Problem& p);
Block block_at(const Problem& p, int64_t worker, int64_t index);
int64_t products(const Problem& p);
int64_t tile_grain(const Problem& p);
int64_t product_grain(const Problem& p, const Block& b);
void transform_input(const Problem& p, const Block& b, int64_t begin, int64_t end);
void multiply(const Problem& p, const Block& b, int64_t begin, int64_t end);
void transform_output(const Problem& p, const Block& b, int64_t begin, int64_t end);

}  // namespace cpu

#define LSGM_WINOGRAD_CONV2D_CPU_KERNELS                                                  \
  void transform_input(const Problem& p, const Block& b, int64_t begin, int64_t end);     \
  void multiply(const Problem& p, const Block& b, int64_t begin, int64_t end);            \
  void transform_output(const Problem& p, const Block& b, int64_t begin, int64_t end);

namespace scalar {
LSGM_WINOGRAD_CONV2D_CPU_KERNELS
}
namespace avx2 {
LSGM_WINOGRAD_CONV2D_CPU_KERNELS
}
namespace avx512 {
LSGM_WINOGRAD_CONV2D_CPU_KERNELS
}
#undef LSGM_WINOGRAD_CONV2D_CPU_KERNELS

}  // namespace winograd_conv2d
}  // namespace lsgm
