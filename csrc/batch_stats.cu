// The operators `batch_stats`, `batch_moments` and `merge_moments`.
#include "batch_stats.cuh"

#include "launch.h"
#include "operators.h"

namespace fused_resnet {
namespace {

// The statistics of y, to `output`.
void reduce(const Arguments& check, const Tensor& y, const StatisticsOutput& output) {
  const int channels = channels_of(y);
  const ReductionTile tile = reduction_tile(rows_of(y), channels, multiprocessors_of(check, y));
  OptionalTensor partial;
  float* partials = nullptr;
  const int64_t size = static_cast<int64_t>(tile.parts) * channels;
  if (tile.parts > 1) {
    partial = torch::stable::new_empty(y, {2, tile.parts, channels}, ScalarType::Float);
    partials = write<float>(*partial);
  }
  with_element(y, [&](auto element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const BatchStatsArguments<T> arguments{
        read<T>(y), partials, partials + size, output, rows_of(y), channels, tile,
    };
    with_width<T>(
        channels, aligned(arguments.y), [&](auto width) { launch(check, batch_stats_kernel<T, width()>, tile.blocks(), y, arguments); });
  });
  if (tile.parts > 1) {
    const MergeMomentsArguments arguments{
        partials, partials + size, channels, PartCounts{nullptr, rows_of(y), tile.rows_per_part}, output, tile.parts, channels,
    };
    launch(check, merge_moments_kernel, merge_blocks(channels), y, arguments);
  }
}

// The results of a norm's statistics, like a vector.
struct Results {
  Tensor mean, invstd, var, scale, bias;

  explicit Results(const Tensor& like, int64_t channels)
      : mean(empty(like, channels)),
        invstd(empty(like, channels)),
        var(empty(like, channels)),
        scale(empty(like, channels)),
        bias(empty(like, channels)) {}

  static Tensor empty(const Tensor& like, int64_t channels) { return torch::stable::new_empty(like, {channels}, ScalarType::Float); }

  StatisticsOutput output(const OptionalTensor& gamma, const OptionalTensor& beta, double eps) const {
    return {read<float>(gamma),  read<float>(beta),  write<float>(mean),     nullptr, write<float>(invstd), write<float>(var),
            write<float>(scale), write<float>(bias), static_cast<float>(eps)};
  }

  Coefficients5 tuple() const { return {mean, invstd, var, scale, bias}; }
};

}  // namespace

Coefficients5 batch_stats(const Tensor& y, const OptionalTensor& gamma, const OptionalTensor& beta, double eps) {
  const Arguments check("batch_stats");
  check.activation("y", y);
  check.vector("gamma", gamma, y);
  check.vector("beta", beta, y);
  const DeviceGuard guard(y);
  const Results results(y, y.size(1));
  reduce(check, y, results.output(gamma, beta, eps));
  return results.tuple();
}

std::tuple<Tensor, Tensor> batch_moments(const Tensor& y) {
  const Arguments check("batch_moments");
  check.activation("y", y);
  const DeviceGuard guard(y);
  const Tensor mean = Results::empty(y, y.size(1)), m2 = Results::empty(y, y.size(1));
  StatisticsOutput output{};
  output.mean = write<float>(mean);
  output.m2 = write<float>(m2);
  reduce(check, y, output);
  return {mean, m2};
}

Coefficients5 merge_moments(const Tensor& counts, const Tensor& means, const Tensor& m2s, const OptionalTensor& gamma,
                            const OptionalTensor& beta, double eps) {
  const Arguments check("merge_moments");
  const int64_t channels = check.moments(counts, means, m2s, gamma, beta);
  const DeviceGuard guard(means);
  const Results results(means, channels);
  const MergeMomentsArguments arguments{
      read<float>(means),
      read<float>(m2s),
      channels,
      PartCounts{read<int64_t>(counts), 0, 0},
      results.output(gamma, beta, eps),
      static_cast<int>(means.size(0)),
      static_cast<int>(channels),
  };
  launch(check, merge_moments_kernel, merge_blocks(arguments.channels), means, arguments);
  return results.tuple();
}

}  // namespace fused_resnet
