// The operations of gan_ops: their schema, their checks, their autograd, and the module that `import gan_ops` loads.
//
// The public operations are built from two private ones (with an underscore), which are what a backend and
// torch.compile see. What no kernel knows (float64; on the CPU float16; no values at all; other devices) is served by
// ATen's operations, and so are gradients that are to be differentiated themselves (create_graph), as often as one
// likes. The sum at a seam is ATen's own.
#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "params.h"

#ifdef GAN_OPS_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
constexpr bool with_cuda = true;
#else
constexpr bool with_cuda = false;
#endif

namespace gan_ops {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What an operation is given besides its input.
struct Norm {
  MaybeTensor weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps, slope;
  bool activate_first, biased, split;
};

bool given(const MaybeTensor& tensor) { return tensor && tensor->defined(); }
at::ScalarType channel_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Checks ------------------------------------------------------------------------------------------------------------

void check_input(const Tensor& x, const char* name) {
  auto type = x.scalar_type();
  TORCH_CHECK(x.dim() >= 2, name, " must have at least 2 dimensions, N and C, not ", x.dim());
  TORCH_CHECK(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
              " must be float64, float32, bfloat16 or float16, not ", type);
}

void check_channels(const Tensor& x, const MaybeTensor& tensor, const char* name, bool moves = false) {
  if (!given(tensor)) return;
  TORCH_CHECK(tensor->dim() == 1 && tensor->sym_size(0) == x.sym_size(1), name, " must have a number for each of the ",
              x.sym_size(1), " channels, not the sizes ", tensor->sym_sizes());
  TORCH_CHECK(tensor->scalar_type() == channel_type(x), name, " must be ", channel_type(x), " with an input of ",
              x.scalar_type(), ", not ", tensor->scalar_type());
  TORCH_CHECK(tensor->device() == x.device(), name, " must be on ", x.device(), " as x is, not on ", tensor->device());
  TORCH_CHECK(!moves || !tensor->requires_grad(), name, " must not require grad: it is moved in place");
  TORCH_CHECK(!moves || tensor->is_contiguous(), name, " must be contiguous: it is moved in place");
}

void check(const Tensor& x, const Norm& norm) {
  check_channels(x, norm.weight, "weight");
  check_channels(x, norm.bias, "bias");
  check_channels(x, norm.running_mean, "running_mean", true);
  check_channels(x, norm.running_var, "running_var", true);
  TORCH_CHECK(given(norm.running_mean) == given(norm.running_var), "running_mean and running_var go together");
  TORCH_CHECK(norm.training || given(norm.running_mean), "running_mean and running_var must be given in evaluation");
  TORCH_CHECK(norm.eps > 0, "eps must be more than 0, not ", norm.eps);
  TORCH_CHECK_VALUE(!norm.training || x.sym_numel() != x.sym_size(1),
                    "x must have more than 1 value per channel when training, not the sizes ", x.sym_sizes());
}

// By ATen's operations ----------------------------------------------------------------------------------------------

// The normalised tensor, before it is split; autograd knows all that happens here.
Tensor by_aten(const Tensor& x, const Norm& norm) {
  std::vector<int64_t> dims{0}, sizes(x.dim(), 1);  // sizes: with which numbers of channels are spread over x
  for (int64_t i = 2; i < x.dim(); ++i) dims.push_back(i);
  sizes[1] = -1;
  auto y = x.to(channel_type(x));
  if (norm.activate_first) y = at::leaky_relu(y, norm.slope);
  if (x.sym_numel() != 0) {  // where there are no values, statistics stay as they are
    auto mean = norm.training ? y.mean(dims) : *norm.running_mean;
    auto var = norm.training ? y.var(dims, false) : *norm.running_var;
    if (norm.training && given(norm.running_mean)) {
      auto spread = norm.biased ? var : y.var(dims, true);
      norm.running_mean->mul_(1 - norm.momentum).add_(mean.detach(), norm.momentum);
      norm.running_var->mul_(1 - norm.momentum).add_(spread.detach(), norm.momentum);
    }
    y = (y - mean.view(sizes)) * (var + norm.eps).rsqrt().view(sizes);
  }
  if (given(norm.weight)) y = y * norm.weight->view(sizes);
  if (given(norm.bias)) y = y + norm.bias->view(sizes);
  if (!norm.activate_first) y = at::leaky_relu(y, norm.slope);
  return y.to(x.scalar_type());
}

// Copies, since a half that is a view could not be changed in place.
variable_list parts_of(const Tensor& y, bool split, at::MemoryFormat format) {
  if (!split) return {y.contiguous(format)};
  auto halves = y.chunk(2, 1);
  return {halves[0].clone(format), halves[1].clone(format)};
}

// By kernels --------------------------------------------------------------------------------------------------------

// On an x86 processor the kernels need AVX2, which ATen looks for.
bool cpu_serves() {
#if defined(__x86_64__) || defined(_M_X64)
  return at::get_cpu_capability() != "DEFAULT";
#else
  return true;
#endif
}

bool has_kernel(const Tensor& x) {
  auto type = x.scalar_type();
  bool here = x.is_cpu() ? cpu_serves() && type != at::kHalf : x.is_cuda() && with_cuda;
  return here && type != at::kDouble && x.sym_numel() != 0;
}

// Of a dense tensor.
Shape shape_of(const Tensor& x) {
  bool contiguous = x.suggest_memory_format() == at::MemoryFormat::Contiguous;
  int64_t c = x.size(1), hw = contiguous ? x.numel() / c / x.size(0) : 1;
  auto type = x.scalar_type();
  return {x.numel() / c / hw, c, hw, type == at::kFloat ? Type::f32 : type == at::kHalf ? Type::f16 : Type::bf16};
}

const float* read(const Tensor& numbers) { return numbers.const_data_ptr<float>(); }
float* written(const Tensor& numbers) { return numbers.mutable_data_ptr<float>(); }

// On CUDA the kernels are launched on the current stream of x's device, and nothing waits for them.
template <typename Call>
void launch(const Tensor& x, const Call& call) {
#ifdef GAN_OPS_CUDA
  if (x.is_cuda()) {
    c10::cuda::CUDAGuard guard(x.device());
    Tensor workspace;
    auto allocate = [&](size_t bytes) {
      workspace = at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
      return workspace.mutable_data_ptr();
    };
    auto stream = c10::cuda::getCurrentCUDAStream().stream();
    C10_CUDA_CHECK(static_cast<cudaError_t>(run_on_cuda(call, allocate, stream)));
    return;
  }
#endif
  run_on_cpu(call);
}

// (y or its first half, its second half or nothing, mean, rstd); x, weight and bias are dense.
std::tuple<Tensor, Tensor, Tensor, Tensor> normalise(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, bool training, double momentum, double eps, double slope, bool activate_first,
    bool biased, bool split) {
  auto sizes = x.sym_sizes().vec();
  if (split) sizes[1] = sizes[1] / 2;
  auto first = at::empty_symint(sizes, x.options(), x.suggest_memory_format());
  auto second = split ? at::empty_like(first) : at::empty({0}, x.options());
  auto mean = training ? at::empty_like(weight) : running_mean->clone();
  auto rstd = training ? at::empty_like(weight) : (*running_var + eps).rsqrt();
  if (!x.is_meta()) {
    Forward f{shape_of(x), training, activate_first, biased, momentum, eps, slope, x.const_data_ptr(),
              {first.mutable_data_ptr(), second.mutable_data_ptr()}, read(weight), read(bias), written(mean),
              written(rstd), nullptr, nullptr};
    if (training && given(running_mean)) {
      f.running_mean = written(*running_mean), f.running_var = written(*running_var);
      running_mean->unsafeGetTensorImpl()->bump_version(), running_var->unsafeGetTensorImpl()->bump_version();
    }
    launch(x, f);
  }
  return {first, second, mean, rstd};
}

// (dx, dweight, dbias) from the gradients of y, or of its two halves.
std::tuple<Tensor, Tensor, Tensor> normalise_backward(
    at::TensorList grads, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, bool training, double slope, bool activate_first) {
  auto dx = at::empty_like(x), dweight = at::empty_like(mean), dbias = at::empty_like(mean);
  if (!x.is_meta()) {
    auto format = x.suggest_memory_format();
    auto first = grads[0].contiguous(format), second = grads[grads.size() - 1].contiguous(format);
    launch(x, Backward{shape_of(x), training, activate_first, slope, x.const_data_ptr(),
                       {first.const_data_ptr(), grads.size() > 1 ? second.const_data_ptr() : nullptr}, read(weight),
                       read(bias), read(mean), read(rstd), dx.mutable_data_ptr(), written(dweight), written(dbias)});
  }
  return {dx, dweight, dbias};
}

struct Normalise : torch::autograd::Function<Normalise> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const Norm& norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gan_ops::_normalise", "")
                         .typed<decltype(normalise)>();
    auto [first, second, mean, rstd] =
        op.call(x, weight, bias, norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps,
                norm.slope, norm.activate_first, norm.biased, norm.split);
    ctx->save_for_backward({x, weight, bias, mean, rstd});
    ctx->saved_data["flags"] = std::vector<bool>{norm.training, norm.activate_first};
    ctx->saved_data["numbers"] = std::vector<double>{norm.eps, norm.slope};
    return norm.split ? variable_list{first, second} : variable_list{first};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto flags = ctx->saved_data["flags"].toBoolList();
    auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    auto saved = ctx->get_saved_variables();
    auto &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &rstd = saved[4];
    if (!at::GradMode::is_enabled()) {
      static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gan_ops::_normalise_backward", "")
                           .typed<decltype(normalise_backward)>();
      auto [dx, dweight, dbias] = op.call(grads, x, weight, bias, mean, rstd, flags[0], numbers[1], flags[1]);
      return {dx, dweight, dbias, Tensor()};
    }
    // The gradients are to be differentiated. Each source is seen through a view of its own, since one of them may have
    // been computed from another.
    variable_list sources{x, weight, bias};
    for (auto& t : sources) t = t.requires_grad() ? t.view_as(t) : t.detach().requires_grad_();
    Norm norm{sources[1], sources[2], {}, {}, flags[0], 0, numbers[0], numbers[1], flags[1], false, grads.size() > 1};
    if (!norm.training) norm.running_mean = mean, norm.running_var = rstd.pow(-2), norm.eps = 0;
    auto parts = parts_of(by_aten(sources[0], norm), norm.split, x.suggest_memory_format());
    auto found = torch::autograd::grad(parts, sources, grads, true, true);
    return {found[0], found[1], found[2], Tensor()};
  }
};

// Public operations -------------------------------------------------------------------------------------------------

variable_list outputs_of(const Tensor& x, const Norm& norm) {
  check(x, norm);
  auto format = x.suggest_memory_format();
  if (!has_kernel(x)) return parts_of(by_aten(x, norm), norm.split, format);
  auto numbers = [&](const MaybeTensor& tensor, double otherwise) {
    if (given(tensor)) return tensor->contiguous();
    return at::full_symint({x.sym_size(1)}, otherwise, x.options().dtype(at::kFloat));
  };
  return Normalise::apply(x.contiguous(format), numbers(norm.weight, 1), numbers(norm.bias, 0), norm);
}

template <bool activate_first>
Tensor one_input(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
                 const MaybeTensor& running_var, bool training, double momentum, double eps, double slope,
                 bool biased) {
  check_input(x, "x");
  return outputs_of(x, {weight, bias, running_mean, running_var, training, momentum, eps, slope, activate_first, biased,
                        false})[0];
}

Tensor sum_of(const Tensor& left, const Tensor& right, bool split) {
  check_input(left, "left");
  check_input(right, "right");
  TORCH_CHECK(left.sym_sizes() == right.sym_sizes() && left.device() == right.device(), "right must be like left, ",
              left.sym_sizes(), " on ", left.device(), ", not ", right.sym_sizes(), " on ", right.device());
  TORCH_CHECK(!split || left.sym_size(1) % 2 == 0, "split must be False, or the number of channels even, not ",
              left.sym_size(1));
  return left + right;
}

variable_list norm_seam(const Tensor& left, const Tensor& right, const MaybeTensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& running_mean, const MaybeTensor& running_var, bool training,
                        double momentum, double eps, double slope, bool split) {
  return outputs_of(sum_of(left, right, split), {weight, bias, running_mean, running_var, training, momentum, eps,
                                                 slope, false, false, split});
}

variable_list bare_seam(const Tensor& left, const Tensor& right, bool split) {
  auto sum = sum_of(left, right, split);
  return parts_of(sum, split, sum.suggest_memory_format());
}

}  // namespace

#define MOVED "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, float slope"
#define NORM "Tensor? weight, Tensor? bias, " MOVED

TORCH_LIBRARY(gan_ops, m) {
  m.def("batch_norm_leaky_relu(Tensor x, " NORM ", bool biased=False) -> Tensor", one_input<false>);
  m.def("leaky_relu_batch_norm(Tensor x, " NORM ", bool biased=False) -> Tensor", one_input<true>);
  m.def("split_add_batch_norm_leaky_relu(Tensor left, Tensor right, " NORM ", bool split) -> Tensor[]", norm_seam);
  m.def("split_add(Tensor left, Tensor right, bool split) -> Tensor[]", bare_seam);
  const auto everywhere = c10::DispatchKey::CompositeExplicitAutograd;  // on fake tensors too
  m.def("_normalise(Tensor x, Tensor weight, Tensor bias, " MOVED ", bool activate_first, bool biased, bool split)"
        " -> (Tensor, Tensor, Tensor, Tensor)", torch::dispatch(everywhere, normalise));
  m.def("_normalise_backward(Tensor[] grads, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
        "bool training, float slope, bool activate_first) -> (Tensor, Tensor, Tensor)",
        torch::dispatch(everywhere, normalise_backward));
}

}  // namespace gan_ops

PyMODINIT_FUNC PyInit_gan_ops() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "gan_ops",
                               "torch.ops.gan_ops: what stands between two convolutions, as one operation.", -1};
  PyObject* self = PyModule_Create(&module);
  PyObject* devices = gan_ops::cpu_serves() ? Py_BuildValue("(s)", "cpu") : PyTuple_New(0);
  if (with_cuda) devices = PySequence_InPlaceConcat(devices, Py_BuildValue("(s)", "cuda"));
  if (self == nullptr || PyModule_AddObject(self, "devices", devices) < 0) return nullptr;
  PyModule_AddStringConstant(self, "torch_version", GAN_OPS_TORCH);
  PyModule_AddStringConstant(self, "without_cuda", GAN_OPS_WITHOUT_CUDA);
  return self;
}
