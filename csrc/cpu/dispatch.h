// Which of the compiled instruction sets is used.
#pragma once

#include "kernels.h"

namespace fused_resnet {

// The kernels in use.
const Kernels& kernels();

// Uses instruction set `number`, or the best that this machine has for -1. Returns the number of what is in use; -1, and nothing is
// changed, where the machine or the build lacks it.
int64_t use_instruction_set(int64_t number);

}  // namespace fused_resnet
