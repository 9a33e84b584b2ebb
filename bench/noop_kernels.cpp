// The kernels of a ResNet's training step in eager PyTorch, as functions that allocate their results and compute nothing: what is left
// is the time of Python, the dispatcher and autograd. They replace ATen's for CPU tensors in the process that loads this library.
#include <torch/library.h>
#include <ATen/ATen.h>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

int64_t extent(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

Tensor convolution(const Tensor& x, const Tensor& w, const Maybe&, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation, bool, at::IntArrayRef, int64_t) {
  return at::empty({x.size(0), w.size(0), extent(x.size(2), w.size(2), stride[0], padding[0], dilation[0]),
                    extent(x.size(3), w.size(3), stride[1], padding[1], dilation[1])},
                   x.options(), x.suggest_memory_format());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor&, const Tensor& x, const Tensor& w, at::OptionalIntArrayRef,
                                                        at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, bool, at::IntArrayRef, int64_t,
                                                        std::array<bool, 3> needed) {
  return {needed[0] ? at::empty_like(x) : Tensor(), needed[1] ? at::empty_like(w) : Tensor(), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const Maybe&, const Maybe&, const Maybe&, const Maybe&, bool, double,
                                              double) {
  return {at::empty_like(x), at::empty({x.size(1)}, x.options()), at::empty({x.size(1)}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor&, const Tensor& x, const Maybe& w, const Maybe&, const Maybe&,
                                                       const Maybe&, const Maybe&, bool, double, std::array<bool, 3>) {
  return {at::empty_like(x), at::empty_like(*w), at::empty_like(*w)};
}

Tensor& relu_(Tensor& x) { return x; }
Tensor threshold_backward(const Tensor& dy, const Tensor&, const at::Scalar&) { return at::empty_like(dy); }
Tensor& add_(Tensor& x, const Tensor&, const at::Scalar&) { return x; }
Tensor add(const Tensor& x, const Tensor&, const at::Scalar&) { return at::empty_like(x); }

std::tuple<Tensor, Tensor> max_pool(const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                                    at::IntArrayRef dilation, bool) {
  const int64_t p = extent(x.size(2), kernel[0], stride[0], padding[0], dilation[0]);
  auto out = at::empty({x.size(0), x.size(1), p, p}, x.options(), x.suggest_memory_format());
  return {out, at::empty_like(out, out.options().dtype(at::kLong))};
}
Tensor max_pool_backward(const Tensor&, const Tensor& x, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, bool,
                         const Tensor&) {
  return at::empty_like(x);
}

Tensor mean(const Tensor& x, at::OptionalIntArrayRef, bool, std::optional<at::ScalarType>) {
  return at::empty({x.size(0), x.size(1), 1, 1}, x.options());
}
Tensor addmm(const Tensor&, const Tensor& a, const Tensor& b, const at::Scalar&, const at::Scalar&) {
  return at::empty({a.size(0), b.size(1)}, a.options());
}
Tensor mm(const Tensor& a, const Tensor& b) { return at::empty({a.size(0), b.size(1)}, a.options()); }

// Running statistics, which batch_norm above would have written: ours are written by these, each a launch.
std::vector<Tensor> foreach_mul(at::TensorList tensors, at::ArrayRef<at::Scalar>) {
  std::vector<Tensor> results;
  for (const Tensor& t : tensors) results.push_back(at::empty_like(t));
  return results;
}
void foreach_lerp_(at::TensorList, at::TensorList, const at::Scalar&) {}
void foreach_add_(at::TensorList, const at::Scalar&) {}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
  m.impl("native_batch_norm", batch_norm);
  m.impl("native_batch_norm_backward", batch_norm_backward);
  m.impl("relu_", relu_);
  m.impl("threshold_backward", threshold_backward);
  m.impl("add_.Tensor", add_);
  m.impl("add.Tensor", add);
  m.impl("max_pool2d_with_indices", max_pool);
  m.impl("max_pool2d_with_indices_backward", max_pool_backward);
  m.impl("mean.dim", mean);
  m.impl("addmm", addmm);
  m.impl("mm", mm);
  m.impl("_foreach_mul.ScalarList", foreach_mul);
  m.impl("_foreach_lerp_.Scalar", foreach_lerp_);
  m.impl("_foreach_add_.Scalar", foreach_add_);
}
