#!/usr/bin/env bash
# Checks and measurements on a machine with a GPU, in parts that take less than eight minutes a call:
#
#   bench/gpu_check.sh PART OUT [COMMIT]
#
# PART  first     what a first look at a GPU asks, most wanted first: eight minutes for one call, half an hour for all of it: the native
#                 library and the kernel cache, every pass plain and under memcheck, the kernels' and operators' tests, training steps of
#                 ResNet-50, a profile, the tuner
#       test      build the native library, and run the tests that a GPU changes, the kernels' first, JOBS files at a time
#       sanitize  every pass under compute-sanitizer's memcheck, racecheck, synccheck and initcheck; the operator tests, of the CUDA passes
#                 and of the Triton convolutions, those of inference too, under the first three
#       kernels   time every pass on ResNet-18's and ResNet-50's shapes against PyTorch's eager mode, torch.compile and cuDNN
#       convolutions
#                 time every operator that ends in a convolution, forward and backward, on ResNet-50's and ResNet-18's shapes against the
#                 same; call it after tune, whose table tells what ours is
#       blocks    time residual blocks, forward and backward, against eager mode and torch.compile
#       tune      measure which convolutions of ResNet-50 and -18 are faster as Triton kernels; train, inference and profile use the table
#       train     time training steps of ResNet-18, -50 and -152 at three batch sizes against both, and find the largest batch
#       inference time ResNet-50 in evaluation mode, ours folded, against both
#       profile   one training step of ResNet-50 by layer, ours, eager and compiled
#       cudnn     which of cuDNN's fused graphs the GPU takes; the operator tests by the backend cudnn; its graphs on ResNet-50's shapes
#                 against triton, passes and eager; tune, and the whole network with cudnn forced and with the tuner's mix
# OUT     a folder for logs, marks and results; it is made
# COMMIT  of this repository; needed where there is no .git
#
# A part is a row of steps. Each leaves OUT/PART-STEP.log, and OUT/PART-STEP.done or .failed; a step with such a mark is not run
# again, so a part that ran out of time goes on when it is called once more. Remove a mark to run its step again.
# Exit status: 0 all steps done; 1 a step failed; 2 a wrong argument; 75 steps are left, call again.
# PYTHON names the interpreter, with PyTorch in it; python3 where unset. JOBS: 8 where unset. No network is used.
# OUT/triton is Triton's cache. One that bench/kernel_cache.py has filled elsewhere, with the same Triton, is used; else `first` fills it.
set -uo pipefail

LIMIT=460  # seconds of a call
JOBS=${JOBS:-8}
PARTS="first test sanitize kernels convolutions blocks tune train inference profile cudnn"
# The passes, in groups that fit into a call: Inductor compiles its peer of each on every shape.
whole="norm_act_forward norm_add_forward norm_backward norm_add_backward"
forward="batch_stats norm_act norm_add_act norm_add_act_raw norm_act_max_pool norm_add_act_avg_pool"
backward="norm_backward_reduce norm_add_backward_reduce norm_backward_apply norm_act_max_pool_backward
  norm_add_act_avg_pool_backward"

# The tests that a GPU changes, what the others rest on first. The part cudnn has its own.
kernel_tests="tests/backends/test_passes.py tests/ops/test_operators.py tests/kernels/test_fprop.py tests/kernels/test_dgrad.py
  tests/kernels/test_wgrad.py tests/csrc/test_native.py tests/backends/test_conv_affine_act.py"
gpu_tests="$kernel_tests tests/backends/test_backends.py tests/ops/test_autograd.py tests/ops/test_opcheck.py tests/nn/test_reproducible.py
  tests/nn/test_precision.py tests/nn/test_recompute.py tests/nn/test_compile.py tests/nn/test_graph.py tests/models/test_models.py
  tests/models/test_training_parity.py tests/convert/test_fuse.py tests/convert/test_fuse_torchvision.py
  tests/test_inference.py tests/bench/test_tune.py tests/cli/test_runs.py"

# The convolutions, a kind a step: Inductor compiles its peer and Triton its kernels for every shape.
convolutions="norm_act_conv norm_add_act_conv norm_add_act_conv_raw norm_add_act_conv_pair conv_stats conv_stats_pair"

refuse() {
  echo "gpu_check.sh: $1" >&2
  exit 2
}

(($# <= 3)) || refuse "expected PART OUT [COMMIT]; got $# arguments"
part=${1:-}
[[ $part =~ ^(${PARTS// /|})$ ]] || refuse "PART: expected one of $PARTS; got '$part'"
out=${2:-}
[[ -n $out ]] || refuse "OUT: expected a folder for logs and results; got none"
mkdir -p "$out" || refuse "OUT: $out can't be made"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(realpath -s "$python")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
commit=${3:-$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null)}
[[ $commit =~ ^[0-9A-Za-z._-]+$ ]] || refuse "COMMIT: expected letters, digits, '.', '_' and '-', and $root is no git checkout; got '$commit'"

# Implementations of a network that share a step, so that they take turns. CUDA graphs keep a step's memory to themselves, and
# max-autotune takes minutes to compile. apex and inplace_abn are rows that say so where they are not installed.
plain="eager eager_nhwc compile cudnn apex inplace_abn ours ours:passes_cuda ours:passes_triton"
triton="eager_nhwc ours:triton"  # by itself: its kernels take minutes to compile where the cache has none
# What makes again what it does not keep, beside what keeps it: its cost in time, and what it saves in memory.
declare -A again=([plain]=ours:recompute [triton]=ours:triton_recompute [graphs]="" [max]="")
graphs=compile_graphs
max=compile_max

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export FUSED_RESNET_CACHE=$out/cache  # in which the table of measured choices lies
export TRITON_CACHE_DIR=$out/triton
unset TRITON_INTERPRET FUSED_RESNET_BACKEND
left_over=0

# step NAME COMMAND...: run a command once, in what is left of the time, and in MOST seconds where that is set.
step() {
  local name=$part-$1 started=$SECONDS status seconds
  shift
  if [[ -e $out/$name.done || -e $out/$name.failed ]]; then
    return
  fi
  if ((left_over || LIMIT - started < 30)); then
    echo "$name: not started"
    left_over=1
    return
  fi
  echo "$name: started"
  seconds=$((LIMIT - started))
  if [[ -n ${MOST:-} ]] && ((MOST < seconds)); then seconds=$MOST; fi
  timeout --kill-after=10 $seconds "$@" >"$out/$name.log" 2>&1
  status=$?
  if ((status == 0)); then
    echo "$((SECONDS - started)) s" >"$out/$name.done"
    echo "$name: done in $((SECONDS - started)) s"
  elif ((status == 124 || status == 137)) && ((started > 30 && seconds == LIMIT - started)); then
    echo "$name: cut off, since other steps had taken the time"
    left_over=1
  else
    echo "exit status $status after $((SECONDS - started)) s" >"$out/$name.failed"
    echo "$name: failed with exit status $status; the end of $name.log:"
    tail -n 20 "$out/$name.log"
  fi
}

# beside NAME COMMAND...: a step that runs while others do, JOBS of them at a time. `together` waits for all.
begun=()
beside() {
  while (($(jobs -rp | wc -l) >= JOBS)); do wait -n; done
  begun+=("$part-$1")
  step "$@" &
}

together() {
  wait
  for name in ${begun[@]+"${begun[@]}"}; do
    [[ -e $out/$name.done || -e $out/$name.failed ]] || left_over=1
  done
}

# Without nvcc, CMake or Ninja the Triton kernels serve, and the tests say what they skip.
build_native() {
  if FUSED_RESNET_NATIVE=1 timeout 240 "$python" setup.py -q build_native --build-lib . --build-temp "$out/build" \
    >"$out/$part-native.log" 2>&1; then
    echo "native library: built"
  else
    echo "native library: not built, going on without it: $(tail -n 1 "$out/$part-native.log")"
  fi
}

# tests OPTION... -- FILE...: a step for each file, some at a time, without the settings of pyproject.toml, whose plug-ins may be missing.
tests() {
  local options=()
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  for file in "$@"; do
    beside "$(basename "$file" .py)" "$python" -m pytest "$file" --maxfail=20 -q -o addopts= -rs "${options[@]}"
  done
  together
}

# bench NAME SUITE OPTIONS...: a step that times something.
bench() {
  local name=$1
  shift
  step "$name" "$python" -m fused_resnet bench "$1" --limit 300 "${@:2}" --device cuda --commit "$commit" --out "$out/results" --plot
}

sanitizer() {
  command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer || echo compute-sanitizer
}

case $part in
  first)
    # The native library and Triton's kernels at the same time: both wait for the CPU alone.
    filling="bench/kernel_cache.py fill '$out/triton' --model resnet50 --batch 256 --dtype bf16"
    MOST=150 beside cache bash -c "'$python' bench/kernel_cache.py adopt '$out/triton' || '$python' $filling"
    build_native
    together
    MOST=90 step plain "$python" bench/sanitize_passes.py
    MOST=120 step memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$(sanitizer)" --tool memcheck --error-exitcode 9 \
      --target-processes application-only "$python" bench/sanitize_passes.py
    # shellcheck disable=SC2086
    MOST=240 tests --quick -m "not slow" -- $kernel_tests
    bench train train --model resnet50 --dtype bf16 --batch 256 --repeats 20 --impl eager_nhwc compile ours:passes_cuda ours:triton
    step profile "$python" -m fused_resnet profile --model resnet50 --impl ours:triton --device cuda --commit "$commit" \
      --out "$out/profile/triton"
    for turn in 1 2 3 4; do
      step "tune-$turn" "$python" -m fused_resnet tune --model resnet50 --batch 256 --dtype bf16 --device cuda --limit 400 --commit "$commit"
    done
    ;;
  test)
    build_native
    # shellcheck disable=SC2086
    tests -m "not slow" -- $gpu_tests
    ;;
  sanitize)
    # First alone: it compiles the kernels, so that no tool has to watch that.
    step plain "$python" bench/sanitize_passes.py
    for tool in memcheck racecheck synccheck initcheck; do
      # Without the caching allocator each tensor is an allocation of its own, whose ends the tools know.
      step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$(sanitizer)" --tool "$tool" --error-exitcode 9 \
        --target-processes application-only "$python" bench/sanitize_passes.py
    done
    # The operators' own tests, whose shapes are small. What their inputs are made by is not ours, and is left alone; initcheck, which
    # has to see every write, is therefore for the program above.
    for tool in memcheck racecheck synccheck; do
      step "operators-$tool" "$(sanitizer)" --tool "$tool" --error-exitcode 9 --target-processes application-only \
        --kernel-name kns=fused_resnet "$python" -m pytest tests/ops/test_operators.py -x -q -o addopts= -k "passes_cuda and float16 and training"
      step "convolutions-$tool" "$(sanitizer)" --tool "$tool" --error-exitcode 9 --target-processes application-only \
        --kernel-name kns=conv_ "$python" -m pytest tests/ops/test_operators.py -x -q -o addopts= \
        -k "triton and not passes_triton and float16 and training"
      step "inference-$tool" "$(sanitizer)" --tool "$tool" --error-exitcode 9 --target-processes application-only \
        --kernel-name kns=conv_ "$python" -m pytest tests/backends/test_conv_affine_act.py -x -q -o addopts= -k "test_the_kernel_agrees and float16"
    done
    ;;
  kernels)
    for dtype in bf16 fp16; do
      for batch in 256 64; do
        for group in whole forward backward; do
          bench "$dtype-$batch-$group" kernels --model resnet18 resnet50 --dtype "$dtype" --batch "$batch" --case ${!group}
        done
      done
    done
    ;;
  convolutions)
    # What takes longer than a minute to compile is a row that says so; a step that is cut off has written the shapes that were done.
    for model in resnet50 resnet18; do
      for kind in $convolutions; do
        [[ $model-$kind != resnet18-conv_stats_pair ]] || continue  # its first block has no projection
        for direction in "" _backward; do
          bench "bf16-$model-256-$kind$direction" kernels --model "$model" --dtype bf16 --batch 256 --case "$kind$direction" --limit 60 \
            --impl eager_nhwc compile ours ours:passes_cuda ours:passes_triton ours:triton ours:cudnn
        done
      done
    done
    ;;
  blocks)
    for model in resnet50 resnet18; do
      for group in plain triton; do
        bench "$model-$group" blocks --model "$model" --dtype bf16 --batch 256 --impl ${!group} ${again[$group]}
      done
    done
    ;;
  tune)
    # What the table has is not measured again, so a step goes on where the one before stopped. A choice serves half to twice its batch.
    for batch in 256 64; do
      for turn in 1 2 3 4 5 6; do
        step "bf16-$batch-$turn" "$python" -m fused_resnet tune --model resnet50 resnet18 --batch "$batch" --dtype bf16 --device cuda \
          --limit 400 --commit "$commit"
      done
    done
    ;;
  train)
    for group in plain triton graphs max; do
      for model in resnet50 resnet18 resnet152; do
        if [[ $group == triton ]]; then  # fill its cache, so that no figure has that in it; what it times is thrown away
          step "warm-$model" "$python" -m fused_resnet bench train --model "$model" --dtype bf16 --batch 64 --repeats 3 \
            --limit 400 --impl ours:triton ours:triton_recompute --device cuda --commit "$commit" --out "$out/warm"
        fi
        # 64 first: every implementation is checked at that batch, so that the compilers find it in their caches later.
        for batch in 64 128 256; do
          bench "bf16-$model-$batch-$group" train --model "$model" --dtype bf16 --batch "$batch" --repeats 20 --impl ${!group} ${again[$group]}
        done
      done
    done
    bench fp16-resnet50-256-plain train --model resnet50 --dtype fp16 --batch 256 --repeats 20 --impl $plain
    for impl in ours eager_nhwc compile eager cudnn ours:passes_cuda ours:passes_triton ours:triton ours:recompute ours:triton_recompute apex \
      inplace_abn compile_graphs compile_max; do
      bench "bf16-resnet50-largest-${impl//:/-}" train --limit 180 --model resnet50 --dtype bf16 --batch 64 --impl "$impl" --largest 4096
    done
    ;;
  inference)
    # Ours without norms, bias, residual and ReLU in the convolutions; two of PyTorch's without norms, too. One image waits for the host.
    plain="$plain folded compile_folded"
    for batch in 256 1; do
      for group in plain triton graphs max; do
        bench "bf16-$batch-$group" inference --model resnet50 --dtype bf16 --batch "$batch" --impl ${!group}
      done
    done
    ;;
  profile)
    for impl in ours eager_nhwc compile; do
      step "$impl" "$python" -m fused_resnet profile --model resnet50 --impl "$impl" --device cuda --commit "$commit" \
        --out "$out/profile/$impl"
    done
    step compared "$python" -m fused_resnet profile --compare "$out/profile/eager_nhwc" "$out/profile/ours" --out "$out/profile/compared"
    ;;
  cudnn)
    # Needs nvidia-cudnn-frontend beside PyTorch; its wheel may be carried here: pip install --no-deps WHEEL. The files of the step
    # probe belong into bench/cudnn_graphs, of which `python bench/cudnn_graphs.py table` makes the tables of docs/backends.md.
    step probe "$python" bench/cudnn_graphs.py probe "$out/cudnn_graphs" --commit "$commit"
    step graphs "$python" -m pytest tests/cudnn -q -o addopts= -rs
    step operators "$python" -m pytest tests/ops/test_operators.py -q -o addopts= -rs -k cudnn
    step backends "$python" -m pytest tests/backends/test_backends.py -q -o addopts= -rs
    for batch in 64 256 400; do
      step "shapes-$batch" "$python" bench/cudnn_graphs.py shapes "$out/results" --batch "$batch" --commit "$commit" --limit 20 --repeats 20
    done
    for batch in 64 256 400; do
      step "tune-$batch" "$python" -m fused_resnet tune --model resnet50 --dtype fp16 --batch "$batch" --limit 400 --task-limit 60 \
        --candidates 4 --no-progress --commit "$commit"
      bench "fp16-resnet50-$batch" train --model resnet50 --dtype fp16 --batch "$batch" \
        --impl eager_nhwc compile ours:passes_cuda ours:triton ours:cudnn ours
    done
    ;;
esac

if ((left_over)); then
  echo "$part: steps are left, call again"
  exit 75
fi
failed=$(find "$out" -maxdepth 1 -name "$part-*.failed" | sort)
if [[ -n $failed ]]; then
  echo "$part: failed:"
  echo "$failed"
  exit 1
fi
echo "$part: done"
