// Every kernel of csrc/cpu/, portable, on pseudo-random tensors; prints a hash of the bits of each result. tests/csrc/test_aarch64.py
// compares machines: the same sources give the same bits on all of them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace fused_resnet;

namespace {

uint64_t state = 88172645463325252ull;
float random_value() {  // in [-2, 2), all of 24 bits
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<float>(static_cast<int64_t>(state >> 40) - (1 << 23)) * 0x1p-22f;
}

// bfloat16 and float16 by cutting bits off: any valid numbers will do.
uint16_t narrow(Element element, float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (element == Element::kBFloat16) return static_cast<uint16_t>(word >> 16);
  const int exponent = static_cast<int>(word >> 23 & 0xff) - 112;
  if (exponent <= 0) return static_cast<uint16_t>(word >> 16 & 0x8000u | (word & 0x3ffu));  // zero becomes a subnormal number
  return static_cast<uint16_t>((word >> 16 & 0x8000u) | (exponent << 10) | (word >> 13 & 0x3ffu));
}

using Bytes = std::vector<unsigned char>;
int size_of(Element element) { return element == Element::kFloat ? 4 : 2; }

Bytes tensor(Element element, int64_t values) {
  Bytes bytes(values * size_of(element));
  for (int64_t i = 0; i < values; ++i) {
    const float value = random_value();
    const uint16_t half = narrow(element, value);
    if (element == Element::kFloat) std::memcpy(&bytes[i * 4], &value, 4);
    else std::memcpy(&bytes[i * 2], &half, 2);
  }
  return bytes;
}

std::vector<float> vector_of(int64_t values, float offset = 0) {
  std::vector<float> made(values);
  for (float& value : made) value = random_value() + offset;
  return made;
}

template <typename T>
void print(const char* kernel, const char* result, Element element, int channels, const std::vector<T>& values) {
  uint64_t hash = 14695981039346656037ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  std::printf("%s %s element %d channels %d: %016llx\n", kernel, result, static_cast<int>(element), channels,
              static_cast<unsigned long long>(hash));
}

void run(Element element, int channels) {
  const Kernels& kernels = portable::kKernels;
  const int images = 3, height = 13, width = 11;
  const int64_t pixels = height * width, rows = images * pixels, values = rows * channels, bytes = values * size_of(element);
  const Extent extent{rows, channels, element};
  const Bytes x = tensor(element, values), residual = tensor(element, values), d = tensor(element, values), dact = tensor(element, values);
  const auto scale = vector_of(channels), bias = vector_of(channels), other_scale = vector_of(channels), other_bias = vector_of(channels);
  const auto mean = vector_of(channels), other_mean = vector_of(channels), invstd = vector_of(channels, 2.5f), gamma = vector_of(channels);
  Bytes mask(rows * groups_of(channels)), act(bytes), dz(bytes), dy(bytes);

  for (int kind = 0; kind < 3; ++kind) {
    kernels.norm_add_act(
        {extent, x.data(), scale.data(), bias.data(), static_cast<Residual>(kind), kind ? residual.data() : nullptr,
         kind == 2 ? other_scale.data() : nullptr, kind == 2 ? other_bias.data() : nullptr, true, act.data(), kind ? mask.data() : nullptr},
        0, rows);
    print("norm_add_act", "act", element, channels, act);
  }
  print("norm_add_act", "mask", element, channels, mask);

  const Parts parts{(rows + 255) / 256, 256};
  std::vector<float> means(parts.count * channels), m2s(means), work(means), m2(channels), found[6];
  kernels.moments({extent, x.data(), parts, means.data(), m2s.data(), work.data()}, 0, parts.count);
  print("moments", "means", element, channels, means);
  print("moments", "m2", element, channels, m2s);
  for (auto& one : found) one.resize(channels);
  kernels.merge_moments({means.data(), m2s.data(), nullptr, parts, rows, channels, gamma.data(), bias.data(), 1e-5, found[0].data(),
                         nullptr, found[1].data(), found[2].data(), found[3].data(), found[4].data()},
                        0, channels);
  for (int i = 0; i < 5; ++i) print("merge_moments", "of five", element, channels, found[i]);

  std::vector<float> sums(3 * parts.count * channels), totals[3];
  for (auto& one : totals) one.resize(channels);
  const BackwardReduce plain{
      extent,   Gradient::kSummed, d.data(),     dact.data(), pixels,          nullptr,           {},        Mask::kBits, mask.data(),
      x.data(), mean.data(),       scale.data(), bias.data(), residual.data(), other_mean.data(), dz.data(), parts,       sums.data()};
  kernels.backward_reduce(plain, 0, parts.count);
  print("backward_reduce", "dz", element, channels, dz);
  print("backward_reduce", "sums", element, channels, sums);
  kernels.merge_sums(
      {sums.data(), parts.count, channels, 3, {nullptr, invstd.data(), nullptr}, {totals[0].data(), totals[1].data(), totals[2].data()}}, 0,
      channels);
  for (const auto& one : totals) print("merge_sums", "of three", element, channels, one);
  std::vector<float> coefficients(3 * channels);
  const BackwardApply apply{extent,       dz.data(),        x.data(),         mean.data(),         invstd.data(),
                            gamma.data(), totals[0].data(), totals[1].data(), coefficients.data(), dy.data()};
  kernels.prepare_apply(apply, 0, channels);
  kernels.backward_apply(apply, 0, rows);
  print("backward_apply", "dy", element, channels, dy);

  const PoolWindow window{3, 2, 1, height, width, (height + 1) / 2, (width + 1) / 2};
  const int64_t lines = images * window.pooled_height, pooled = lines * window.pooled_width * channels;
  Bytes out(pooled * size_of(element)), index(pooled);
  kernels.max_pool({extent, x.data(), scale.data(), bias.data(), window, out.data(), index.data()}, 0, lines);
  print("max_pool", "out", element, channels, out);
  print("max_pool", "index", element, channels, index);
  const Bytes dout = tensor(element, pooled);
  std::vector<float> two(2 * parts.count * channels);
  kernels.backward_reduce({extent, Gradient::kMaxPooled, dout.data(), nullptr, pixels, index.data(), window, Mask::kRecomputed, nullptr,
                           x.data(), mean.data(), scale.data(), bias.data(), nullptr, nullptr, dz.data(), parts, two.data()},
                          0, parts.count);
  print("max_pool backward", "dz", element, channels, dz);
  print("max_pool backward", "sums", element, channels, two);

  std::vector<float> of_images(images * channels);
  Bytes averages(images * channels * size_of(element));
  kernels.avg_pool(
      {{extent, x.data(), scale.data(), bias.data(), Residual::kMaterialised, residual.data(), nullptr, nullptr, true, nullptr,
        mask.data()},
       pixels,
       of_images.data(),
       averages.data()},
      0, images);
  print("avg_pool", "out", element, channels, averages);
  print("avg_pool", "mask", element, channels, mask);
}

}  // namespace

int main() {
  for (Element element : {Element::kFloat, Element::kHalf, Element::kBFloat16})
    for (int channels : {1, 13, 64}) run(element, channels);
}
