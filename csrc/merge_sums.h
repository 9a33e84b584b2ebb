// The second step of a reduction, as a call.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace fused_resnet {

// Launches merge_sums_kernel for that many sums, on the device of x.
void merge_sums(const Arguments& check, const MergeSumsArguments& arguments, int sums, const Tensor& x);

}  // namespace fused_resnet
