// What a kernel is given, and the table of kernels of an instruction set.
//
// A kernel takes a range of work, so that threads may share it: rows, parts, images or channels. How the work is divided depends on
// shapes alone and sums are merged in one order, so the same input gives the same bits, whatever the number of threads.
#pragma once

#include <stdint.h>

#include "../layout.h"

namespace fused_resnet {

enum class Element { kFloat, kHalf, kBFloat16 };

// A tensor in NHWC as a matrix [rows, channels].
struct Extent {
  int64_t rows;
  int channels;
  Element element;
};

// Rows that are summed together: part p is [p * rows_per_part, (p + 1) * rows_per_part), cut at `rows`.
struct Parts {
  int64_t count, rows_per_part;
};

struct NormAddAct {
  Extent extent;
  const void* x;
  const float* scale;
  const float* bias;
  Residual kind;
  const void* residual;         // nullptr for kNone
  const float* residual_scale;  // nullptr but for kRaw, as its bias
  const float* residual_bias;
  bool relu;
  void* act;
  uint8_t* mask;  // or nullptr
};

struct Moments {
  Extent extent;
  const void* y;
  Parts parts;
  float* mean;  // [parts, channels], as m2 and sum
  float* m2;
  float* sum;  // to work in
};

// What is made of the moments of all rows. Each [channels].
struct MergeMoments {
  const float* means;  // [parts, channels], as m2s
  const float* m2s;
  const int64_t* counts;  // [parts]; or nullptr, where `parts` and `rows` tell them
  Parts parts;
  int64_t rows;
  int channels;
  const float* gamma;  // or nullptr
  const float* beta;   // or nullptr
  double eps;
  float* mean;
  float* m2;      // nullptr, or the one result beside the mean
  float* invstd;  // this and all that follow: nullptr with m2
  float* var;
  float* scale;
  float* bias;
};

// Where the gradient of a backward reduction comes from.
enum class Gradient { kPlain, kSummed, kAveraged, kMaxPooled };

struct PoolWindow {
  int size, stride, padding;
  int height, width;  // of x
  int pooled_height, pooled_width;
};

struct BackwardReduce {
  Extent extent;
  Gradient gradient;
  const void* d;
  const void* dact;       // kSummed
  int64_t pixels;         // kAveraged: of an image
  const uint8_t* index;   // kMaxPooled, as the window
  PoolWindow window;
  Mask kind;
  const uint8_t* mask;  // kBits
  const void* x;
  const float* mean;
  const float* scale;  // this and bias: kRecomputed
  const float* bias;
  const void* residual;  // or nullptr: of a raw residual
  const float* residual_mean;
  void* dz;
  Parts parts;
  float* sums;  // [2, or 3 with a residual; parts; channels]: Σ dz, Σ dz·(x − mean), Σ dz·(residual − its mean)
};

struct MergeSums {
  const float* sums;  // as in BackwardReduce
  int64_t parts;
  int channels;
  int count;               // of sums: 2 or 3
  const float* factor[3];  // [channels], or nullptr for 1
  float* total[3];         // [channels]
};

struct BackwardApply {
  Extent extent;
  const void* dz;
  const void* y;
  const float* mean;
  const float* invstd;
  const float* gamma;  // or nullptr
  const float* s1;
  const float* s2;
  float* coefficients;  // [3, channels], by prepare_apply
  void* dy;
};

struct MaxPool {
  Extent extent;  // of x
  const void* x;
  const float* scale;
  const float* bias;
  PoolWindow window;
  void* out;
  uint8_t* index;
};

struct AvgPool {
  NormAddAct given;  // act: nullptr
  int64_t pixels;    // of an image
  float* sums;       // [images, channels], to work in
  void* out;         // [images, channels]
};

// Sizes of products by matrix instructions (tiles.h): the rows of a tile, those of a block, of which channels are multiples; and channels
// of a 3x3 convolution that has a block of its own, half a tile deep.
constexpr int kTileSide = 16, kBlockSide = 2 * kTileSide, kNarrowChannels = 16;

// Convolutions of bfloat16 or fp32 with the passes around them: 1x1 (pointwise.h), and 3x3 with a padding of 1 (window.h).
struct PackWeight {
  const void* weight;  // [outputs, taps, inputs]
  int64_t outputs, inputs, taps;
  bool forward;
  void* packed;
};

// A 3x3 convolution takes `per_unit` images at once; a unit has whole parts of rows.
struct Images {
  int64_t count, height, width, per_unit;
};

struct ConvForward {
  NormAddAct norm;  // its act is y's input; not pending: its x is
  bool pending;
  const void* packed;  // the weight, forward
  void* y;
  Moments moments;  // of y; mean is nullptr where nobody asks for them. Its parts are those of the work
  Images images;    // 3x3
};

struct ConvBackward {
  BackwardApply apply;  // dy: nullptr where nobody else reads it
  const void* packed;   // the weight, backward; nullptr where nobody asks for dx
  BackwardReduce reduce;  // d is the convolution's. Not pending: of it the extent, the parts, dact and, for dx, dz
  bool pending;
  const void* act;
  int64_t taps;                     // 1 or 9
  Images images;                    // 3x3
  int64_t groups, units_per_group;  // of a 1x1 convolution, units are parts
  float* sums;  // of dweight, [groups, taps, outputs, inputs], the last two in tiles; nullptr where it is not summed here
};

// dweight of the whole dy, where its sums are too many for a cache: each thread sums a part of it over all pixels.
struct WeightGradient {
  const void* dy;
  const void* act;
  int64_t rows, outputs, inputs, taps;
  Images images;  // 3x3
  int64_t column_groups;  // that the inputs are divided into; with the blocks of 32 outputs, they are the units of work
  float* sums;  // as above, of one group
};

struct MergeWeight {
  const float* sums;
  int64_t groups, outputs, inputs, taps;
  void* dweight;  // [outputs, taps, inputs]
};

// Of one element type.
struct Convolutions {
  void (*pack_weight)(const PackWeight&, int64_t first_block, int64_t last_block);  // of 16 columns
  // `scratch`: as many bytes as the function below tells.
  void (*pointwise_forward)(const ConvForward&, int64_t first_part, int64_t last_part, void* scratch);
  void (*pointwise_backward)(const ConvBackward&, int64_t first_group, int64_t last_group, void* scratch);
  int64_t (*pointwise_forward_scratch)(const ConvForward&);
  int64_t (*pointwise_backward_scratch)(const ConvBackward&);
  void (*window_forward)(const ConvForward&, int64_t first_unit, int64_t last_unit, void* scratch);
  void (*window_backward)(const ConvBackward&, int64_t first_group, int64_t last_group, void* scratch);
  int64_t (*window_forward_scratch)(const ConvForward&);
  int64_t (*window_backward_scratch)(const ConvBackward&);
  void (*weight_gradient)(const WeightGradient&, int64_t first_unit, int64_t last_unit, void* scratch);
  int64_t (*weight_gradient_scratch)(const WeightGradient&);
  void (*merge_weight)(const MergeWeight&, int64_t first_block, int64_t last_block);  // of 16 outputs
};

struct Kernels {
  void (*norm_add_act)(const NormAddAct&, int64_t first_row, int64_t last_row);
  void (*moments)(const Moments&, int64_t first_part, int64_t last_part);
  void (*merge_moments)(const MergeMoments&, int64_t first_channel, int64_t last_channel);
  void (*backward_reduce)(const BackwardReduce&, int64_t first_part, int64_t last_part);
  void (*merge_sums)(const MergeSums&, int64_t first_channel, int64_t last_channel);
  void (*prepare_apply)(const BackwardApply&, int64_t first_channel, int64_t last_channel);
  void (*backward_apply)(const BackwardApply&, int64_t first_row, int64_t last_row);
  void (*max_pool)(const MaxPool&, int64_t first_line, int64_t last_line);  // lines of out: image by image, height by height
  void (*avg_pool)(const AvgPool&, int64_t first_image, int64_t last_image);
  const Convolutions* of_float;
  const Convolutions* of_bfloat16;

  const Convolutions& convolutions(Element element) const { return element == Element::kFloat ? *of_float : *of_bfloat16; }
};

// The tables. The numbers of fused_resnet.native.INSTRUCTION_SETS. Weak: a build for tests leaves some out.
#define FUSED_RESNET_TABLE(isa)                        \
  namespace isa {                                      \
  extern const Kernels kKernels __attribute__((weak)); \
  }
FUSED_RESNET_TABLE(portable)
#if defined(__x86_64__)
FUSED_RESNET_TABLE(avx2)
FUSED_RESNET_TABLE(avx512)
FUSED_RESNET_TABLE(avx512_bf16)
FUSED_RESNET_TABLE(amx)
#endif
#undef FUSED_RESNET_TABLE

// Those that other instruction sets take, too.
namespace portable {
extern const Convolutions kBFloat16Convolutions;
}
namespace avx512 {
extern const Convolutions kFloatConvolutions;
}

}  // namespace fused_resnet
