// The operations of gan_ops: their schema, their checks, their autograd, and the module that `import gan_ops` loads.
//
// The public operations are built from two private ones (with an underscore), which are what a backend and
// torch.compile see. Types that no kernel knows (float64; on the CPU float16) are served by ATen's operations, and so
// are gradients that are to be differentiated themselves (create_graph), as often as one likes.
#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "params.h"

#ifdef GAN_OPS_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace gan_ops {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::autograd::variable_list;

// What an operation is given besides its input. Not to `normalise` is for a seam alone.
struct Norm {
  MaybeTensor weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps, slope;
  bool normalise = true, activate_first = false, biased = false, split = false;
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
  TORCH_CHECK(tensor->dim() == 1 && tensor->sym_size(0) == x.sym_size(1), name, " must have one number for each of the ",
              x.sym_size(1), " channels, not the sizes ", tensor->sym_sizes());
  TORCH_CHECK(tensor->scalar_type() == channel_type(x), name, " must be ", channel_type(x), " with an input of ",
              x.scalar_type(), ", not ", tensor->scalar_type());
  TORCH_CHECK(tensor->device() == x.device(), name, " must be on ", x.device(), " as x is, not on ", tensor->device());
  TORCH_CHECK(!moves || !tensor->requires_grad(), name, " must not require grad: it is moved in place");
  TORCH_CHECK(!moves || tensor->is_contiguous(), name, " must be contiguous: it is moved in place");
}

void check(const Tensor& x, const Norm& norm) {
  TORCH_CHECK(!norm.split || x.sym_size(1) % 2 == 0, "split must be False, or the number of channels even, not ",
              x.sym_size(1));
  if (!norm.normalise) return;
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

// Memory ------------------------------------------------------------------------------------------------------------

Shape shape_of(const Tensor& x, at::MemoryFormat format) {
  int64_t c = x.size(1), hw = format == at::MemoryFormat::Contiguous ? x.numel() / c / x.size(0) : 1;
  auto type = x.scalar_type();
  return {x.numel() / c / hw, c, hw, type == at::kFloat ? Type::f32 : type == at::kHalf ? Type::f16 : Type::bf16};
}

Tensor empty_half(const Tensor& x, bool split, at::MemoryFormat format) {
  auto sizes = x.sym_sizes().vec();
  if (split) sizes[1] = sizes[1] / 2;
  return at::empty_symint(sizes, x.options(), format);
}

Tensor dense(const MaybeTensor& tensor, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return given(tensor) ? tensor->contiguous(format) : Tensor();
}

const void* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
void* data(const Tensor& tensor, bool there) { return there ? tensor.mutable_data_ptr() : nullptr; }

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
  return type != at::kDouble && (x.is_cuda() || (type != at::kHalf && cpu_serves()));
}

// On CUDA the kernels are launched on the current stream of x's device, and nothing waits for them.
template <typename Call>
void launch(const Tensor& x, const Call& call) {
#ifdef GAN_OPS_CUDA
  if (x.is_cuda()) {
    c10::cuda::CUDAGuard guard(x.device());
    auto workspace = at::empty({static_cast<int64_t>(workspace_bytes(call.shape))}, x.options().dtype(at::kByte));
    auto stream = c10::cuda::getCurrentCUDAStream().stream();
    C10_CUDA_CHECK(static_cast<cudaError_t>(run_on_cuda(call, workspace.mutable_data_ptr(), stream)));
    return;
  }
#endif
  run_on_cpu(call);
}

// ATen's operations in place of a kernel ------------------------------------------------------------------------------

using Normalised = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// All dimensions but the channels', and the sizes with which numbers of channels are spread over them.
std::pair<std::vector<int64_t>, std::vector<int64_t>> around_channels(const Tensor& x) {
  std::vector<int64_t> dims{0}, sizes(x.dim(), 1);
  for (int64_t i = 2; i < x.dim(); ++i) dims.push_back(i);
  sizes[1] = -1;
  return {dims, sizes};
}

// (y, mean, rstd); x: of a seam the sum of both branches.
Gradients normalise_by_aten(const Tensor& x, const Norm& norm) {
  auto [dims, sizes] = around_channels(x);
  auto a = x.to(channel_type(x));
  if (norm.activate_first) a = at::leaky_relu(a, norm.slope);
  auto mean = norm.training ? a.mean(dims) : norm.running_mean->clone();
  auto var = norm.training ? a.var(dims, false) : *norm.running_var;
  if (norm.training && given(norm.running_mean)) {
    double count = x.numel() / x.size(1), factor = norm.biased ? 1 : count / (count - 1);
    norm.running_mean->mul_(1 - norm.momentum).add_(mean, norm.momentum);
    norm.running_var->mul_(1 - norm.momentum).add_(var, norm.momentum * factor);
  }
  auto rstd = (var + norm.eps).rsqrt(), scale = given(norm.weight) ? rstd * *norm.weight : rstd;
  auto y = (a - mean.view(sizes)) * scale.view(sizes);
  if (given(norm.bias)) y = y + norm.bias->view(sizes);
  if (!norm.activate_first) y = at::leaky_relu(y, norm.slope);
  return {y.to(x.scalar_type()), mean, rstd};
}

// eps: given where the gradients are to be differentiated themselves; mean and rstd are then seen as functions of x.
Gradients backward_by_aten(const Tensor& grad, const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias,
                           const Tensor& mean_, const Tensor& rstd_, bool training, std::optional<double> eps,
                           double slope, bool activate_first) {
  auto [dims, sizes] = around_channels(input);
  auto x = input.to(mean_.scalar_type()), g = grad.to(mean_.scalar_type());
  auto a = activate_first ? at::leaky_relu(x, slope) : x;
  auto mean = training && eps ? a.mean(dims, true) : mean_.view(sizes);
  auto rstd = training && eps ? (a.var(dims, false, true) + *eps).rsqrt() : rstd_.view(sizes);
  auto normal = (a - mean) * rstd;
  auto y = given(weight) ? normal * weight->view(sizes) : normal;
  if (given(bias)) y = y + bias->view(sizes);
  if (!activate_first) g = at::where(y > 0, g, g * slope);
  auto dnormal = given(weight) ? g * weight->view(sizes) : g, da = dnormal;
  if (training) da = da - dnormal.mean(dims, true) - normal * (dnormal * normal).mean(dims, true);
  da = da * rstd;
  auto dx = activate_first ? at::where(x > 0, da, da * slope) : da;
  return {dx.to(input.scalar_type()), (g * normal).sum(dims), g.sum(dims)};
}

// Private operations ------------------------------------------------------------------------------------------------

// (y or its first half, its second half, the sum of a seam, mean, rstd); what there is not is empty.
Normalised normalise(const Tensor& x, const MaybeTensor& right, const MaybeTensor& weight, const MaybeTensor& bias,
                     const MaybeTensor& running_mean, const MaybeTensor& running_var, bool training, double momentum,
                     double eps, double slope, bool normalise, bool activate_first, bool biased, bool split) {
  Norm norm{weight, bias, running_mean, running_var, training, momentum, eps, slope, normalise, activate_first, biased,
            split};
  check(x, norm);
  auto format = x.suggest_memory_format();
  auto none = [&] { return at::empty({0}, x.options()); };
  auto first = empty_half(x, split, format), second = split ? at::empty_like(first) : none();
  auto sum = normalise && given(right) ? empty_half(x, false, format) : none();
  auto mean = normalise ? at::empty_symint({x.sym_size(1)}, x.options().dtype(channel_type(x))) : none();
  auto rstd = at::empty_like(mean);
  Normalised result{first, second, sum, mean, rstd};
  if (x.is_meta()) return result;
  if (x.numel() == 0) {
    mean.zero_(), rstd.zero_();
    return result;
  }
  auto left = x.contiguous(format), other = dense(right, format), scale = dense(weight), shift = dense(bias);
  bool reads = normalise && (!training || given(running_mean));
  if (has_kernel(x)) {
    launch(x, Forward{shape_of(left, format), normalise, training, activate_first, biased, momentum, eps, slope,
                      data(left), data(other), data(sum, sum.numel()), {data(first, true), data(second, split)},
                      data(scale), data(shift), reads ? running_mean->mutable_data_ptr() : nullptr,
                      reads ? running_var->mutable_data_ptr() : nullptr, data(mean, normalise), data(rstd, normalise)});
  } else {
    auto input = given(right) ? left + other : left, y = input;
    if (normalise) std::tie(y, std::get<3>(result), std::get<4>(result)) = normalise_by_aten(input, norm);
    if (sum.numel()) sum.copy_(input);
    first.copy_(y.narrow(1, 0, first.size(1)));
    if (split) second.copy_(y.narrow(1, first.size(1), first.size(1)));
  }
  if (training && reads) {
    running_mean->unsafeGetTensorImpl()->bump_version();
    running_var->unsafeGetTensorImpl()->bump_version();
  }
  return result;
}

// (dx, dweight, dbias); `second` is the gradient of the second half.
Gradients normalise_backward(const Tensor& first, const MaybeTensor& second, const Tensor& x, const MaybeTensor& weight,
                             const MaybeTensor& bias, const Tensor& mean, const Tensor& rstd, bool training,
                             double slope, bool activate_first) {
  auto format = x.suggest_memory_format();
  auto dweight = at::empty_symint({x.sym_size(1)}, x.options().dtype(channel_type(x)));
  Gradients result{empty_half(x, false, format), dweight, at::empty_like(dweight)};
  if (x.is_meta()) return result;
  auto& [dx, dw, dbias] = result;
  auto values = x.contiguous(format), grad = first.contiguous(format), scale = dense(weight), shift = dense(bias);
  auto other = dense(second, format);
  if (x.numel() == 0) {
    dw.zero_(), dbias.zero_();
  } else if (has_kernel(x)) {
    launch(x, Backward{shape_of(values, format), training, activate_first, slope, {data(grad), data(other)},
                       data(values), data(scale), data(shift), data(mean), data(rstd), data(dx, true),
                       data(dw, given(weight)), data(dbias, given(bias))});
  } else {
    auto whole = given(second) ? at::cat({grad, other}, 1) : grad;
    result = backward_by_aten(whole, values, weight, bias, mean, rstd, training, {}, slope, activate_first);
  }
  return result;
}

// The private operations through the dispatcher, by name.
template <typename F>
auto find(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

variable_list call(const Tensor& x, const MaybeTensor& right, const Norm& norm, variable_list* rest = nullptr) {
  static auto op = find("gan_ops::_normalise", normalise);
  auto [first, second, sum, mean, rstd] = op.call(
      x, right, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps,
      norm.slope, norm.normalise, norm.activate_first, norm.biased, norm.split);
  if (rest) *rest = {sum, mean, rstd};
  return norm.split ? variable_list{first, second} : variable_list{first};
}

// Autograd ----------------------------------------------------------------------------------------------------------

struct Normalise : torch::autograd::Function<Normalise> {
  // The outputs, and at a seam the sum, since second gradients pass through it.
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const MaybeTensor& right,
                               const MaybeTensor& weight, const MaybeTensor& bias, const Norm& norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list rest, outputs = call(x, right, norm, &rest);
    bool seam = given(right) && norm.normalise;
    ctx->set_materialize_grads(!norm.normalise);
    if (norm.normalise) {
      ctx->save_for_backward({seam ? rest[0] : x, weight.value_or(Tensor()), bias.value_or(Tensor()), rest[1], rest[2]});
    }
    ctx->saved_data["flags"] = std::vector<bool>{norm.normalise, norm.training, norm.activate_first, norm.split};
    ctx->saved_data["numbers"] = std::vector<double>{norm.eps, norm.slope};
    if (seam) outputs.push_back(rest[0]);
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    auto flags = ctx->saved_data["flags"].toBoolList();
    auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    bool training = flags[1], activate_first = flags[2], split = flags[3];
    double eps = numbers[0], slope = numbers[1];
    if (!flags[0]) {
      auto grad = split ? at::cat({grads[0], grads[1]}, 1) : grads[0];
      return {grad, grad, Tensor(), Tensor(), Tensor()};
    }
    auto saved = ctx->get_saved_variables();
    auto &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &rstd = saved[4];
    size_t outputs = split ? 2 : 1;
    bool seam = grads.size() > outputs;
    Tensor dx, dweight, dbias;
    if (grads[0].defined() || (split && grads[1].defined())) {
      for (size_t i = 0; i < outputs; ++i) {
        if (!grads[i].defined()) grads[i] = at::zeros_like(grads[1 - i]);
      }
      if (at::GradMode::is_enabled()) {
        auto grad = split ? at::cat({grads[0], grads[1]}, 1) : grads[0];
        std::tie(dx, dweight, dbias) =
            backward_by_aten(grad, x, weight, bias, mean, rstd, training, eps, slope, activate_first);
      } else {
        static auto op = find("gan_ops::_normalise_backward", normalise_backward);
        std::tie(dx, dweight, dbias) = op.call(grads[0], split ? MaybeTensor(grads[1]) : std::nullopt, x, weight, bias,
                                               mean, rstd, training, slope, activate_first);
      }
    }
    if (seam && grads[outputs].defined()) dx = dx.defined() ? dx + grads[outputs] : grads[outputs];
    return {dx, seam ? dx : Tensor(), weight.defined() ? dweight : Tensor(), bias.defined() ? dbias : Tensor(),
            Tensor()};
  }
};

// Public operations ---------------------------------------------------------------------------------------------------

// y, or its two halves. `differentiable` is where autograd looks on; a forward-mode gradient counts too, so that
// autograd says that there is none here, where it would be lost else.
template <bool differentiable>
variable_list outputs_of(const Tensor& x, const MaybeTensor& right, const Norm& norm) {
  bool wanted = false;
  for (const MaybeTensor& t : {MaybeTensor(x), right, norm.weight, norm.bias}) {
    wanted |= given(t) && ((at::GradMode::is_enabled() && t->requires_grad()) || t->_fw_grad(0).defined());
  }
  if (differentiable && wanted) {
    auto outputs = Normalise::apply(x, right, norm.weight, norm.bias, norm);
    outputs.resize(norm.split ? 2 : 1);
    return outputs;
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call(x, right, norm);
}

template <bool differentiable, bool activate_first>
Tensor one_input(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
                 const MaybeTensor& running_var, bool training, double momentum, double eps, double slope,
                 bool biased) {
  check_input(x, "x");
  Norm norm{weight, bias, running_mean, running_var, training, momentum, eps, slope, true, activate_first, biased};
  return outputs_of<differentiable>(x, std::nullopt, norm)[0];
}

// Both branches in the type that PyTorch's own sum of them has.
template <bool differentiable>
variable_list seam(const Tensor& left, const Tensor& right, const Norm& norm) {
  check_input(left, "left");
  check_input(right, "right");
  TORCH_CHECK(left.sym_sizes() == right.sym_sizes(), "right must have the sizes of left, ", left.sym_sizes(), ", not ",
              right.sym_sizes());
  TORCH_CHECK(left.device() == right.device(), "right must be on ", left.device(), " as left is, not on ",
              right.device());
  auto type = at::result_type(left, right);
  return outputs_of<differentiable>(left.to(type), right.to(type), norm);
}

template <bool differentiable>
variable_list norm_seam(const Tensor& left, const Tensor& right, const MaybeTensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& running_mean, const MaybeTensor& running_var, bool training,
                        double momentum, double eps, double slope, bool split) {
  return seam<differentiable>(left, right, {weight, bias, running_mean, running_var, training, momentum, eps, slope,
                                            true, false, false, split});
}

template <bool differentiable>
variable_list bare_seam(const Tensor& left, const Tensor& right, bool split) {
  return seam<differentiable>(left, right, {{}, {}, {}, {}, false, 0, 1, 0, false, false, false, split});
}

template <bool differentiable>
void implement(torch::Library& m) {
  m.impl("batch_norm_leaky_relu", one_input<differentiable, false>);
  m.impl("leaky_relu_batch_norm", one_input<differentiable, true>);
  m.impl("split_add_batch_norm_leaky_relu", norm_seam<differentiable>);
  m.impl("split_add", bare_seam<differentiable>);
}

void implement_private(torch::Library& m) {
  m.impl("_normalise", normalise);
  m.impl("_normalise_backward", normalise_backward);
}

}  // namespace

#define NORM \
  "Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, " \
  "float eps, float slope"

TORCH_LIBRARY(gan_ops, m) {
  m.def("batch_norm_leaky_relu(Tensor x, " NORM ", bool biased=False) -> Tensor");
  m.def("leaky_relu_batch_norm(Tensor x, " NORM ", bool biased=False) -> Tensor");
  m.def("split_add_batch_norm_leaky_relu(Tensor left, Tensor right, " NORM ", bool split) -> Tensor[]");
  m.def("split_add(Tensor left, Tensor right, bool split) -> Tensor[]");
  m.def("_normalise(Tensor x, Tensor? right, " NORM ", bool normalise, bool activate_first, bool biased, bool split)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_normalise_backward(Tensor first, Tensor? second, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
        "Tensor rstd, bool training, float slope, bool activate_first) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gan_ops, CompositeExplicitAutograd, m) { implement<false>(m); }
TORCH_LIBRARY_IMPL(gan_ops, Autograd, m) { implement<true>(m); }
TORCH_LIBRARY_IMPL(gan_ops, CPU, m) { implement_private(m); }
TORCH_LIBRARY_IMPL(gan_ops, Meta, m) { implement_private(m); }
#ifdef GAN_OPS_CUDA
TORCH_LIBRARY_IMPL(gan_ops, CUDA, m) { implement_private(m); }
#endif

}  // namespace gan_ops

PyMODINIT_FUNC PyInit_gan_ops() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "gan_ops",
                               "torch.ops.gan_ops: what stands between two convolutions, as one operation.", -1};
  PyObject* self = PyModule_Create(&module);
  if (self == nullptr) return nullptr;
  PyObject* devices = gan_ops::cpu_serves() ? Py_BuildValue("(s)", "cpu") : PyTuple_New(0);
#ifdef GAN_OPS_CUDA
  devices = PySequence_InPlaceConcat(devices, Py_BuildValue("(s)", "cuda"));
#endif
  if (PyModule_AddObject(self, "devices", devices) < 0) return nullptr;
  PyModule_AddStringConstant(self, "torch_version", GAN_OPS_TORCH);
  PyModule_AddStringConstant(self, "without_cuda", GAN_OPS_WITHOUT_CUDA);
  return self;
}
