"""The mutants of tests/mutants.py: what is made wrong where, and which tests should see it."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A small fault."""

    name: str  #: what is wrong, in words
    path: str  #: of the file, from the checkout's root
    right: str  #: what stands there, once
    wrong: str  #: what stands there instead
    tests: str  #: arguments of pytest, as a shell reads them

    @property
    def is_native(self) -> bool:
        """Whether the native library for CPUs has to be built for it."""
        return self.path.startswith("csrc/cpu/")

    def applied(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError where what is right does not stand there once."""
        if (count := text.count(self.right)) != 1:
            raise ValueError(f"{self.path}: expected {self.right!r} once, for the mutant {self.name!r}; it stands there {count} times")
        return text.replace(self.right, self.wrong)


PASSES, AUTOGRAD, DEFINITION = "tests/backends/test_passes.py", "tests/ops/test_autograd.py", "tests/ops/test_definition.py"
CONVENTION, MODES = "tests/ops/test_gradient_convention.py", "tests/nn/test_training_modes.py"
STOPS, STEPS = "tests/train/test_stops.py", "tests/train/test_steps.py"
AS_PYTORCH, TRAIN, RUNS = "tests/nn/test_as_pytorch.py", "tests/train/test_train.py", "tests/train/test_run_folder.py"
LOADER, FILES, GATE = "tests/data/test_loader.py", "tests/test_files.py", "tests/bench/test_gate.py"
INTERPRETED, CUDA = (f"{PASSES} -k '{backend} and not float16 and not bfloat16'" for backend in ("passes_triton", "emulated"))
CPU, WINDOWS = f"{PASSES} -k passes_cpu", "tests/backends/test_conv_with_passes.py"
DISTRIBUTED = "tests/distributed"
REFERENCE, CHECKPOINT = "fused_resnet/reference.py", "fused_resnet/train/checkpoint.py"
TRAINER, NODE = "fused_resnet/train/trainer.py", "fused_resnet/ops/node.py"
RUN_FOLDER, EVALUATION = "fused_resnet/train/folder.py", "fused_resnet/train/evaluation.py"
RUNNING, BATCH_STATS = "fused_resnet/ops/running.py", "fused_resnet/kernels/batch_stats.py"

MUTANTS = [
    # The definition, and the operators made of it.
    Mutant("NaN stops a gradient in the definition", REFERENCE, "return ~(z <= 0)", "return z > 0", DEFINITION),
    Mutant("an average pool's gradient is divided by its lines alone", REFERENCE, "d = dout.double() / (x.shape[2] * x.shape[3])", "d = dout.double() / x.shape[2]", DEFINITION),
    Mutant("a max pool gives the gradient to the last of equals", REFERENCE, "index = ((taps == best) | taps.isnan()).to(torch.uint8).argmax(-1)", "index = taps.shape[-1] - 1 - ((taps == best) | taps.isnan()).to(torch.uint8).flip(-1).argmax(-1)", f"{AUTOGRAD} -k max_pool"),
    Mutant("batch norm's backward forgets the mean of dz", REFERENCE, "dx = dz.double() - per_channel(s1) / n - ", "dx = dz.double() - ", CONVENTION),
    Mutant("batch norm's backward forgets gamma", REFERENCE, "per_channel(invstd if gamma is None else invstd.double() * gamma) * dx", "per_channel(invstd) * dx", CONVENTION),
    Mutant("sums are of dz before its rounding", REFERENCE, "return self._reduced(nhwc(dz.to(source.x.dtype)), source)\n\n    @staticmethod\n    def _passing", "return nhwc(dz.to(source.x.dtype)), *self._reduced(nhwc(dz), source)[1:]\n\n    @staticmethod\n    def _passing", f"{PASSES} -k 'passes_cpu and reduce'"),
    Mutant("a gradient of the activation's other readers is lost", REFERENCE, "dz = d.double() + (0 if dact is None else dact)", "dz = d.double()", f"{CONVENTION} {AUTOGRAD}"),
    Mutant("merged moments forget the distance of means", REFERENCE, "(m2s.double() / counts.sum() + share * (means.double() - mean) ** 2)", "(m2s.double() / counts.sum())", f"{PASSES} -k 'passes_cpu and merge'"),
    Mutant("frozen norms have a batch's gradient", REFERENCE, "        if output.training:\n            return self.norm_backward_apply(", "        if True:\n            return self.norm_backward_apply(", MODES),
    Mutant("a weight's gradient keeps the framework's strides", REFERENCE, "return dw if dw.stride() == weight.stride() else torch.empty_like(weight).copy_(dw)", "return dw", DEFINITION),
    Mutant("shared moments' counts travel as float32", "fused_resnet/collectives.py", "bits = torch.full((1,), count, dtype=torch.int64, device=mean.device).view(mean.dtype)", "bits = torch.full((2,), count, dtype=torch.float32, device=mean.device).to(mean.dtype)[: 8 // mean.element_size()]", f"{DISTRIBUTED} -k sync_bn"),
    Mutant("shared sums are not scaled by a process's share", "fused_resnet/collectives.py", "(own[:-1] * (count / own[-1]))", "(own[:-1] / 2)", f"{DISTRIBUTED} -k sync_bn"),
    # Running statistics.
    Mutant("a running variance is of the biased one", RUNNING, "[n / (n - 1) if n else 1.0 for n in sizes]", "[1.0 for n in sizes]", f"{MODES} -k batch_norms"),
    Mutant("batches are not counted", RUNNING, "torch._foreach_add_(counts, 1)", "torch._foreach_add_(counts, 0)", f"{MODES} -k batch_norms"),
    Mutant("half statistics are blended in half precision", RUNNING, "dtypes = [torch.promote_types(t.dtype, b.dtype) for", "dtypes = [t.dtype for", AS_PYTORCH),
    Mutant("a shared norm is told of one batch", "fused_resnet/nn/activation.py", "told[norm] = before = told.get(norm, -1) + 1", "if norm in told:\n            continue\n        told[norm] = before = 0", AS_PYTORCH),
    Mutant("a checkpoint's second forward tells the statistics", RUNNING, "if torch._C._current_graph_task_id() != -1:\n        return", "if False:\n        return", f"{MODES} -k 'checkpointing and blocks'"),
    # Nodes of autograd, modules, fuse.
    Mutant("a projection's gradient does not reach the input", NODE, "of_act, of_beside = dx if act_is_read and source.residual_mean is None else None, (dx, s1, residual_s2)", "of_act, of_beside = dx if act_is_read and source.residual_mean is None else None, (None, s1, residual_s2)", f"{MODES} -k batch_norms"),
    Mutant("gradients of gamma and beta are exchanged", NODE, "of_layer += dw, output.s2 if need_dgamma else None, output.s1 if need_dbeta else None", "of_layer += dw, output.s1 if need_dgamma else None, output.s2 if need_dbeta else None", f"{CONVENTION} {AUTOGRAD}"),
    Mutant("hooks on inner modules are not asked for", "fused_resnet/nn/prepared.py", "if any(self._hooks):\n            return False", "if False:\n            return False", "tests/nn/test_prepared.py -k hook"),
    Mutant("a cast weight is kept for the next step", "fused_resnet/nn/prepared.py", 'own = all(conv._parameters["weight"].dtype is x.dtype for conv in self._modules[::2])', "own = True", "tests/nn/test_prepared.py -k autocast"),
    Mutant("a changed forward of a class is ignored", "fused_resnet/convert/known.py", "if getattr(original, name) is not method:", "if False:", "tests/convert/test_structure.py -k changes_on_a_class"),
    Mutant("a convolution's bias is dropped", "fused_resnet/nn/modules.py", 'return _is_plain_conv(module) and held(module, "bias") is None', "return _is_plain_conv(module)", f"{AS_PYTORCH} -k a_bias_that_is_no_parameter"),
    Mutant("folding forgets a convolution's own bias", "fused_resnet/inference.py", "bias = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale", "bias = -norm.running_mean * scale", "tests/test_inference.py"),
    Mutant("folding forgets eps", "fused_resnet/inference.py", "scale = (norm.running_var.double() + eps).rsqrt()", "scale = norm.running_var.double().rsqrt()", "tests/test_inference.py"),
    Mutant("what is derived of a weight outlives a write to it", "fused_resnet/derived.py", "self.version == source._version\n            and ", "", "tests/backends/test_onednn.py"),
    Mutant("oneDNN's ReLU hides NaN", "fused_resnet/backends/onednn.py", "if finite := math.isfinite(t.sum().item()):", "if finite := True:", "tests/backends/test_onednn.py"),
    Mutant("a forced backend stays behind an error", "fused_resnet/backends/__init__.py", "    try:\n        yield\n    finally:\n        _force(before)", "    yield\n    _force(before)", "tests/backends/test_backends.py"),
    Mutant("autocast undoes the cast to float32", "fused_resnet/backends/passes_cpu.py", 'with torch.autocast("cpu", enabled=False):', "if True:", "tests/backends/test_products.py"),
    # Triton's kernels, interpreted.
    Mutant("Triton: eps is fixed", BATCH_STATS, "tl.sqrt_rn(var + eps)", "tl.sqrt_rn(var + 1e-5)", INTERPRETED),
    Mutant("Triton: merged moments forget eps", BATCH_STATS, "tl.sqrt_rn(var + eps)", "tl.sqrt_rn(var)", INTERPRETED),
    Mutant("Triton: the last rows count as a whole tile", BATCH_STATS, "delta = tl.where(valid, y - mean, 0.0)", "delta = y - mean", INTERPRETED),
    Mutant("Triton: ReLU hides NaN", "fused_resnet/kernels/elements.py", "return tl.where(z <= 0.0, 0.0, z)", "return tl.where(z > 0.0, z, 0.0)", INTERPRETED),
    Mutant("Triton: a residual's own bias is forgotten", "fused_resnet/kernels/elements.py", "z += tl.fma(residual, residual_scale, residual_bias)", "z += residual * residual_scale", INTERPRETED),
    Mutant("Triton: fprop reads what lies beside the image", "fused_resnet/kernels/fprop.py", "on_image = (r < R) & (h >= 0) & (h < H) & (edge + element >= 0) & (edge + element < W * FLAT_C)", "on_image = (r < R) & (h >= 0) & (h < H)", "tests/kernels/test_fprop.py"),
    Mutant("Triton: dgrad begins at the wrong tap of a stride", "fused_resnet/kernels/dgrad.py", "first = tl.where(-back * DILATION % STRIDE == parity, -back, first)", "first = tl.where(-back % STRIDE == parity, -back, first)", "tests/kernels/test_dgrad.py"),
    Mutant("Triton: dgrad forgets an image's first pixels", "fused_resnet/kernels/dgrad.py", "first_h = (parity_h + PADDING_H * (STRIDE_H - 1)) % STRIDE_H", "first_h = parity_h", "tests/kernels/test_dgrad.py"),
    Mutant("Triton: wgrad leaves out the last split", "fused_resnet/kernels/wgrad.py", "there = (split < splits)[:, None] & (at < elements)[None, :]", "there = (split < splits - 1)[:, None] & (at < elements)[None, :]", "tests/kernels/test_wgrad.py"),
    Mutant("Triton: wgrad counts taps on padding", "fused_resnet/kernels/wgrad.py", "valid_row = valid_row & on_image", "valid_row = valid_row", "tests/kernels/test_wgrad.py"),
    # CUDA C++ kernels, emulated.
    Mutant("CUDA: eps is fixed", "csrc/batch_stats.cuh", "sqrtf(variance + eps)", "sqrtf(variance + 1e-5f)", CUDA),
    Mutant("CUDA: NaN stops a gradient", "csrc/elements.cuh", "return z <= 0.0f; }", "return !(z > 0.0f); }", CUDA),
    Mutant("CUDA: a merge forgets the distance of means", "csrc/batch_stats.cuh", "m2 += fmaf(away * away, count * share, other.m2);", "m2 += other.m2;", CUDA),
    Mutant("CUDA: the average pool's gradient is not divided", "csrc/norm_backward.cuh", "return d.get(i) / pixels; }", "return d.get(i); }", CUDA),
    Mutant("CUDA: a raw residual's sum has the other's mean", "csrc/norm_backward.cuh", "residual[s].get(i) - residual_mean[i]", "residual[s].get(i) - mean[i]", CUDA),
    # Kernels for CPUs.
    Mutant("CPU: merged moments forget eps", "csrc/cpu/statistics.h", "static_cast<double>(var) + given.eps", "static_cast<double>(var)", CPU),
    Mutant("CPU: a part's rest is of the sample's mean", "csrc/cpu/statistics.h", "mean[c] += away;", "", CPU),
    Mutant("CPU: a raw residual's bias is forgotten", "csrc/cpu/elementwise.h", "fma(added.at[v], residual_scale.at[v], residual_bias.at[v])", "added.at[v] * residual_scale.at[v]", CPU),
    Mutant("CPU: bfloat16 is cut, not rounded", "csrc/cpu/vector.h", "__m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));", "__m256i sum = bits; (void)odd;", CPU),
    Mutant("CPU: images of another unit stay in the window", "csrc/cpu/window.h", "if (unit.images < images.per_unit) clear();", "", WINDOWS),
    Mutant("CPU: memory is given to two tensors", "csrc/cpu/memory.cpp", "    taken = found->first;\n    unused_.erase(found);", "    taken = found->first;", "tests/csrc/test_memory_cpu.py"),
    # Training.
    Mutant("evaluation runs in training mode", EVALUATION, "    model.eval()\n", "", TRAIN),
    Mutant("label smoothing is ignored", TRAINER, "nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)", "nn.CrossEntropyLoss()", TRAIN),
    Mutant("a resumed run begins with a new gradient scaler", TRAINER, '            self.scaler.load_state_dict(state["scaler"])\n', "", TRAIN),
    Mutant("a resumed run begins with new random numbers", TRAINER, '            torch.set_rng_state(state["rng"]["cpu"])\n', "", TRAIN),
    Mutant("a resumed run has no momentum", TRAINER, "            self.optimizer.load_state_dict(optimizer)\n", "", TRAIN),
    Mutant("the schedule begins anew on resume", TRAINER, "learning_rate(self.config, self.epoch * steps + batch, steps)", "learning_rate(self.config, batch, steps)", TRAIN),
    Mutant("weight decay acts on norms", "fused_resnet/train/optimizer.py", "config.weight_decay if config.decay_norms else 0.0", "config.weight_decay", TRAIN),
    Mutant("images a second are doubled", TRAINER, '"images_per_second": images / self._seconds,', '"images_per_second": 2 * images / self._seconds,', TRAIN),
    Mutant("a line of metrics comes before its checkpoint", RUN_FOLDER, "replace_file(folder / METRICS, lambda file: file.writelines(_line(record) for record in history))", "pass", f"{TRAIN} {RUNS}"),
    Mutant("a run within an epoch goes on at its start", TRAINER, "loader.batches(self.epoch, self.batch)", "loader.batches(self.epoch)", RUNS),
    Mutant("sums of an epoch under way are forgotten", TRAINER, "for name in (\"loss_sum\", \"correct\")}", "for name in ()}", RUNS),
    Mutant("the best checkpoint is the last", RUN_FOLDER, "if best_epoch(trainer.history) == trainer.epoch:", "if True:", STOPS),
    Mutant("gradients are clipped while they are scaled", TRAINER, "            self.scaler.unscale_(self.optimizer)\n", "", STEPS),
    Mutant("parts of a batch add up to a multiple of its loss", TRAINER, " / len(parts)\n", "\n", STEPS),
    Mutant("evaluations see the network beside its moving average", TRAINER, "return self.model if self.ema is None else self.ema.module", "return self.model", STEPS),
    Mutant("mixtures draw from the run's generator", "fused_resnet/train/augment.py", "torch.default_generator.manual_seed(mixed(mixed(mixed(self.seed, epoch), batch), self.rank))", "pass", STEPS),
    Mutant("a run's folder is not locked", RUN_FOLDER, "held.enter_context(locked(folder / LOCK, wait=False))", "pass", RUNS),
    Mutant("a file is renamed before it is on the disk", "fused_resnet/files.py", "            os.fsync(file.fileno())\n", "", FILES),
    Mutant("a failed write leaves its part", "fused_resnet/files.py", "        part.unlink(missing_ok=True)\n\n\ndef with_section", "        pass\n\n\ndef with_section", FILES),
    Mutant("a checkpoint may hold code", CHECKPOINT, "weights_only=True)", "weights_only=False)", "tests/train/test_checkpoint.py"),
    Mutant("evaluation leaves the last images out", "fused_resnet/data/loader.py", "zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)", "zip(self.images.split(self.batch_size)[:-1], self.labels.split(self.batch_size)[:-1], strict=True)", LOADER),
    Mutant("each epoch draws the same", "fused_resnet/data/loader.py", "mixed(self.seed, epoch)", "mixed(self.seed, 0)", LOADER),
    Mutant("labels are not shuffled with their images", "fused_resnet/data/loader.py", "yield self._normalised(images), self.labels[order[pick]]", "yield self._normalised(images), self.labels[pick]", LOADER),
    # Counting and measuring.
    Mutant("roofline counts groups as one", "fused_resnet/problem.py", "return self.k * (self.c // self.groups) * self.r * self.s", "return self.k * self.c * self.r * self.s", "tests/test_problem.py tests/test_roofline.py"),
    Mutant("roofline counts a mask's bits as bytes", "fused_resnet/problem.py", "return self.count * ceil_div(self.c, 8)", "return self.count * self.c", "tests/test_problem.py tests/test_roofline.py"),
    Mutant("a kernel's floor is the smaller of two", "fused_resnet/problem.py", "return max(self.flops / flops_per_s, self.bytes / bytes_per_s)", "return min(self.flops / flops_per_s, self.bytes / bytes_per_s)", "tests/test_problem.py tests/test_roofline.py"),
    Mutant("the median is the fastest call", "fused_resnet/bench/timing.py", "return Times(median.item(), p10.item(), p90.item())", "return Times(p10.item(), p10.item(), p90.item())", "tests/bench/test_timing.py"),
    Mutant("the gate takes NaN", "fused_resnet/bench/gate.py", 'return {name: error if error == error else float("inf") for name, error in found.items()}', "return {name: error if error == error else 0.0 for name, error in found.items()}", f"{GATE} -k no_number"),
    Mutant("the gate forgets running statistics", "fused_resnet/bench/gate.py", "found = {name: self._error(name, answer.get(name), copies) for name in self.answer}", "found = {name: 0.0 if name.startswith(CHANGE) else self._error(name, answer.get(name), copies) for name in self.answer}", f"{GATE} -k statistics"),
    Mutant("a comparison takes the slower for the faster", "bench/compare.py", "if ratio > threshold and new.p10_ms > old.p90_ms:", "if ratio < 1 / threshold and new.p90_ms < old.p10_ms:", "tests/bench/test_results.py"),
    Mutant("the tuner takes the slowest", "fused_resnet/bench/tune.py", "best = min(medians, key=medians.get)", "best = max(medians, key=medians.get)", "tests/bench/test_tune.py -k agrees"),
    Mutant("a tuned choice serves any batch", "fused_resnet/tuning/table.py", "return None if near is None or distances[near] > log(reach) + 1e-9 else of_shape[near]", "return None if near is None else of_shape[near]", "tests/tuning/test_tuning.py -k nearest"),
    Mutant("writers of a tuning table lose each other's entries", "fused_resnet/tuning/table.py", "table = read_table(path)[1] if path.exists() else Table()", "table = Table()", "tests/tuning/test_tuning.py -k writers"),
    Mutant("a drawing's texts are not escaped", "fused_resnet/profile/svg.py", 'text-anchor="{anchor}"{turned}>{escape(words)}</text>', 'text-anchor="{anchor}"{turned}>{words}</text>', "tests/profile/test_svg.py"),
]  # fmt: skip
