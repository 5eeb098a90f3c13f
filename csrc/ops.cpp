// The operations of gan_ops: their schema, their checks, their autograd, and the module that `import gan_ops` loads.
//
// The public operations are built from private ones (with an underscore), which are what a backend and torch.compile
// see. Types that no kernel knows (float64; on the CPU float16) are served by ATen's operations, and so are gradients
// that are to be differentiated themselves (create_graph), as often as one likes.
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

// What a normalisation is given besides its input.
struct Norm {
  MaybeTensor weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps, slope;
  bool activate_first = false, biased = false, split = false;
};

bool given(const MaybeTensor& tensor) { return tensor && tensor->defined(); }

// Checks ------------------------------------------------------------------------------------------------------------

void check_input(const Tensor& x, const char* name) {
  auto type = x.scalar_type();
  TORCH_CHECK(x.dim() >= 2, name, " must have at least 2 dimensions, N and C, not ", x.dim());
  TORCH_CHECK(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
              " must be float64, float32, bfloat16 or float16, not ", type);
}

void check_channels(const Tensor& x, const MaybeTensor& tensor, const char* name) {
  if (!given(tensor)) return;
  auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(tensor->dim() == 1 && tensor->sym_size(0) == x.sym_size(1), name,
              " must have one number for each of the ", x.sym_size(1), " channels, not the sizes ",
              tensor->sym_sizes());
  TORCH_CHECK(tensor->scalar_type() == type, name, " must be ", type, " with an input of ", x.scalar_type(), ", not ",
              tensor->scalar_type());
  TORCH_CHECK(tensor->device() == x.device(), name, " must be on ", x.device(), " as the input is, not on ",
              tensor->device());
}

void check_running(const MaybeTensor& tensor, const char* name) {
  if (!given(tensor)) return;
  TORCH_CHECK(!tensor->requires_grad(), name, " must not require grad: it is moved in place");
  TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous: it is moved in place");
}

void check_pair(const Tensor& left, const Tensor& right) {
  check_input(left, "left");
  check_input(right, "right");
  TORCH_CHECK(left.sym_sizes() == right.sym_sizes(), "right must have the sizes of left, ", left.sym_sizes(), ", not ",
              right.sym_sizes());
  TORCH_CHECK(left.device() == right.device(), "right must be on ", left.device(), " as left is, not on ",
              right.device());
}

void check_split(const Tensor& x, bool split) {
  TORCH_CHECK(!split || x.sym_size(1) % 2 == 0, "split must be False, or the number of channels even, not ",
              x.sym_size(1));
}

void check_norm(const Tensor& x, const Norm& norm) {
  check_channels(x, norm.weight, "weight");
  check_channels(x, norm.bias, "bias");
  check_channels(x, norm.running_mean, "running_mean");
  check_channels(x, norm.running_var, "running_var");
  check_running(norm.running_mean, "running_mean");
  check_running(norm.running_var, "running_var");
  TORCH_CHECK(given(norm.running_mean) == given(norm.running_var),
              "running_mean and running_var must be given together");
  TORCH_CHECK(norm.training || given(norm.running_mean), "running_mean and running_var must be given in evaluation");
  TORCH_CHECK(norm.eps > 0, "eps must be more than 0, not ", norm.eps);
  TORCH_CHECK_VALUE(!norm.training || x.sym_numel() != x.sym_size(1),
                    "x must have more than 1 value per channel when training, not the sizes ", x.sym_sizes());
  check_split(x, norm.split);
}

// Layout ------------------------------------------------------------------------------------------------------------

at::TensorOptions channel_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

Shape shape_of(const Tensor& x, at::MemoryFormat format) {
  int64_t c = x.size(1), hw = format == at::MemoryFormat::Contiguous ? x.numel() / c / x.size(0) : 1;
  auto type = x.scalar_type();
  return {x.numel() / c / hw, c, hw, type == at::kFloat ? Type::f32 : type == at::kHalf ? Type::f16 : Type::bf16};
}

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

std::vector<c10::SymInt> sizes_of_half(const Tensor& x, bool split) {
  auto sizes = x.sym_sizes().vec();
  if (split) sizes[1] = sizes[1] / 2;
  return sizes;
}

// The outputs of an input x: all of it, or two halves.
std::pair<Tensor, Tensor> empty_halves(const Tensor& x, bool split, at::MemoryFormat format) {
  auto half = at::empty_symint(sizes_of_half(x, split), x.options(), format);
  return {half, split ? at::empty_like(half) : at::empty({0}, x.options())};
}

Tensor dense(const MaybeTensor& tensor, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return given(tensor) ? tensor->contiguous(format) : Tensor();
}

const void* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
void* data(const Tensor& tensor, bool there) { return there ? tensor.mutable_data_ptr() : nullptr; }

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

std::pair<Tensor, Tensor> halves_of(const Tensor& y, bool split, at::MemoryFormat format) {
  if (!split) return {y, at::empty({0}, y.options())};
  auto halves = y.chunk(2, 1);
  return {halves[0].clone(format), halves[1].clone(format)};
}

// x: of a seam the sum of both branches.
Normalised normalise_by_aten(const Tensor& x, const Norm& norm, at::MemoryFormat format) {
  auto [dims, sizes] = around_channels(x);
  auto a = x.to(channel_options(x).dtype());
  if (norm.activate_first) a = at::leaky_relu(a, norm.slope);
  Tensor mean, var;
  if (norm.training) {
    mean = a.mean(dims), var = a.var(dims, false);  // var_mean has no infinite mean
    if (given(norm.running_mean)) {
      double count = x.numel() / x.size(1), factor = norm.biased ? 1 : count / (count - 1);
      norm.running_mean->mul_(1 - norm.momentum).add_(mean, norm.momentum);
      norm.running_var->mul_(1 - norm.momentum).add_(var, norm.momentum * factor);
    }
  } else {
    mean = norm.running_mean->clone(), var = *norm.running_var;
  }
  auto rstd = (var + norm.eps).rsqrt();
  auto scale = given(norm.weight) ? rstd * *norm.weight : rstd;
  auto y = (a - mean.view(sizes)) * scale.view(sizes);
  if (given(norm.bias)) y = y + norm.bias->view(sizes);
  if (!norm.activate_first) y = at::leaky_relu(y, norm.slope);
  auto [first, second] = halves_of(y.to(x.scalar_type()), norm.split, format);
  return {first, second, x, mean, rstd};
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
  auto dnormal = given(weight) ? g * weight->view(sizes) : g;
  auto da = dnormal;
  if (training) da = da - dnormal.mean(dims, true) - normal * (dnormal * normal).mean(dims, true);
  da = da * rstd;
  auto dx = activate_first ? at::where(x > 0, da, da * slope) : da;
  return {dx.to(input.scalar_type()), (g * normal).sum(dims), g.sum(dims)};
}

// Private operations ------------------------------------------------------------------------------------------------

// (y or its first half, its second half, the sum of a seam, mean, rstd); what there is not is empty.
Normalised empty_normalised(const Tensor& x, bool seam, bool split, at::MemoryFormat format) {
  auto [first, second] = empty_halves(x, split, format);
  auto sum = seam ? at::empty_symint(x.sym_sizes(), x.options(), format) : at::empty({0}, x.options());
  auto mean = at::empty_symint({x.sym_size(1)}, channel_options(x));
  return {first, second, sum, mean, at::empty_like(mean)};
}

Normalised normalise(const Tensor& x, const MaybeTensor& right, const MaybeTensor& weight, const MaybeTensor& bias,
                     const MaybeTensor& running_mean, const MaybeTensor& running_var, bool training, double momentum,
                     double eps, double slope, bool activate_first, bool biased, bool split) {
  Norm norm{weight, bias, running_mean, running_var, training, momentum, eps, slope, activate_first, biased, split};
  check_norm(x, norm);
  auto format = x.suggest_memory_format();
  auto left = x.contiguous(format), scale = dense(weight), shift = dense(bias), other = dense(right, format);
  bool seam = given(right), reads = !training || given(running_mean);
  auto result = empty_normalised(x, seam, split, format);
  auto& [first, second, sum, mean, rstd] = result;
  if (x.numel() == 0) {
    mean.zero_(), rstd.zero_();
    return result;
  }
  if (has_kernel(x)) {
    launch(x, Forward{shape_of(left, format), true, training, activate_first, biased, momentum, eps, slope,
                      left.const_data_ptr(), data(other), data(sum, seam), {data(first, true), data(second, split)},
                      data(scale), data(shift), reads ? running_mean->mutable_data_ptr() : nullptr,
                      reads ? running_var->mutable_data_ptr() : nullptr, data(mean, true), data(rstd, true)});
  } else {
    auto empty = sum;
    result = normalise_by_aten(seam ? left + other : left, norm, format);
    if (!seam) sum = empty;  // an output must not be the input
  }
  if (training && reads) {
    running_mean->unsafeGetTensorImpl()->bump_version();
    running_var->unsafeGetTensorImpl()->bump_version();
  }
  return result;
}

Normalised fake_normalise(const Tensor& x, const MaybeTensor& right, const MaybeTensor& weight,
                          const MaybeTensor& bias, const MaybeTensor& running_mean, const MaybeTensor& running_var,
                          bool training, double momentum, double eps, double slope, bool activate_first, bool biased,
                          bool split) {
  check_norm(x, {weight, bias, running_mean, running_var, training, momentum, eps, slope, activate_first, biased,
                 split});
  return empty_normalised(x, given(right), split, x.suggest_memory_format());
}

Gradients empty_gradients(const Tensor& x, at::MemoryFormat format) {
  auto dweight = at::empty_symint({x.sym_size(1)}, channel_options(x));
  return {at::empty_symint(x.sym_sizes(), x.options(), format), dweight, at::empty_like(dweight)};
}

// (dx, dweight, dbias); `second` is the gradient of the second half.
Gradients normalise_backward(const Tensor& first, const MaybeTensor& second, const Tensor& x, const MaybeTensor& weight,
                             const MaybeTensor& bias, const Tensor& mean, const Tensor& rstd, bool training,
                             double slope, bool activate_first) {
  TORCH_CHECK(first.numel() * (given(second) ? 2 : 1) == x.numel() && first.scalar_type() == x.scalar_type() &&
                  (!given(second) || second->sizes() == first.sizes()),
              "the gradients must be of x's type and, together, of its size");
  TORCH_CHECK(mean.numel() == x.size(1) && rstd.numel() == x.size(1), "mean and rstd must have a number per channel");
  auto format = x.suggest_memory_format();
  auto values = x.contiguous(format), grad = first.contiguous(format), scale = dense(weight), shift = dense(bias);
  auto other = dense(second, format);
  auto result = empty_gradients(x, format);
  auto& [dx, dweight, dbias] = result;
  if (x.numel() == 0) {
    dweight.zero_(), dbias.zero_();
  } else if (has_kernel(x)) {
    launch(x, Backward{shape_of(values, format), training, activate_first, slope, {grad.const_data_ptr(), data(other)},
                       values.const_data_ptr(), data(scale), data(shift), mean.const_data_ptr(), rstd.const_data_ptr(),
                       data(dx, true), data(dweight, given(weight)), data(dbias, given(bias))});
  } else {
    auto whole = given(second) ? at::cat({grad, other}, 1) : grad;
    result = backward_by_aten(whole, values, weight, bias, mean, rstd, training, {}, slope, activate_first);
  }
  return result;
}

Gradients fake_normalise_backward(const Tensor&, const MaybeTensor&, const Tensor& x, const MaybeTensor&,
                                  const MaybeTensor&, const Tensor&, const Tensor&, bool, double, bool) {
  return empty_gradients(x, x.suggest_memory_format());
}

std::tuple<Tensor, Tensor> add(const Tensor& left, const Tensor& right, bool split) {
  auto format = left.suggest_memory_format();
  auto x = left.contiguous(format), y = right.contiguous(format);
  if (!has_kernel(x)) return halves_of(x + y, split, format);
  auto [first, second] = empty_halves(x, split, format);
  if (x.numel() > 0) {
    Forward call{};
    call.shape = shape_of(x, format);
    call.x = x.const_data_ptr(), call.right = y.const_data_ptr();
    call.out[0] = data(first, true), call.out[1] = data(second, split);
    launch(x, call);
  }
  return {first, second};
}

std::tuple<Tensor, Tensor> fake_add(const Tensor& left, const Tensor&, bool split) {
  return empty_halves(left, split, left.suggest_memory_format());
}

// Calls of the private operations, through the dispatcher -------------------------------------------------------------

Normalised call_normalise(const Tensor& x, const MaybeTensor& right, const Norm& norm) {
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gan_ops::_normalise", "").typed<decltype(normalise)>();
  return op.call(x, right, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.momentum,
                 norm.eps, norm.slope, norm.activate_first, norm.biased, norm.split);
}

Gradients call_backward(const Tensor& first, const MaybeTensor& second, const Tensor& x, const MaybeTensor& weight,
                        const MaybeTensor& bias, const Tensor& mean, const Tensor& rstd, bool training, double slope,
                        bool activate_first) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("gan_ops::_normalise_backward", "")
                       .typed<decltype(normalise_backward)>();
  return op.call(first, second, x, weight, bias, mean, rstd, training, slope, activate_first);
}

std::tuple<Tensor, Tensor> call_add(const Tensor& left, const Tensor& right, bool split) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gan_ops::_add", "").typed<decltype(add)>();
  return op.call(left, right, split);
}

// Autograd ----------------------------------------------------------------------------------------------------------

Tensor or_zeros(const Tensor& grad, const Tensor& x, bool split) {
  return grad.defined() ? grad : at::zeros_symint(sizes_of_half(x, split), x.options());
}

struct Normalise : torch::autograd::Function<Normalise> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const MaybeTensor& right,
                               const MaybeTensor& weight, const MaybeTensor& bias, const Norm& norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [first, second, sum, mean, rstd] = call_normalise(x, right, norm);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({given(right) ? sum : x, weight.value_or(Tensor()), bias.value_or(Tensor()), mean, rstd});
    ctx->saved_data["training"] = norm.training;
    ctx->saved_data["eps"] = norm.eps;
    ctx->saved_data["slope"] = norm.slope;
    ctx->saved_data["activate_first"] = norm.activate_first;
    ctx->saved_data["split"] = norm.split;
    variable_list outputs{first};
    if (norm.split) outputs.push_back(second);
    if (given(right)) outputs.push_back(sum);  // an output, since second gradients pass through it
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &rstd = saved[4];
    bool training = ctx->saved_data["training"].toBool(), split = ctx->saved_data["split"].toBool();
    bool activate_first = ctx->saved_data["activate_first"].toBool();
    double eps = ctx->saved_data["eps"].toDouble(), slope = ctx->saved_data["slope"].toDouble();
    size_t outputs = split ? 2 : 1;
    bool seam = grads.size() > outputs;
    Tensor dx, dweight, dbias;
    if (grads[0].defined() || (split && grads[1].defined())) {
      auto first = or_zeros(grads[0], x, split), second = split ? or_zeros(grads[1], x, split) : Tensor();
      if (at::GradMode::is_enabled()) {
        auto grad = split ? at::cat({first, second}, 1) : first;
        std::tie(dx, dweight, dbias) =
            backward_by_aten(grad, x, weight, bias, mean, rstd, training, eps, slope, activate_first);
      } else {
        std::tie(dx, dweight, dbias) =
            call_backward(first, second, x, weight, bias, mean, rstd, training, slope, activate_first);
      }
    }
    if (seam && grads[outputs].defined()) dx = dx.defined() ? dx + grads[outputs] : grads[outputs];
    return {dx, seam ? dx : Tensor(), weight.defined() ? dweight : Tensor(), bias.defined() ? dbias : Tensor(),
            Tensor()};
  }
};

struct Add : torch::autograd::Function<Add> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& left, const Tensor& right,
                               bool split) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [first, second] = call_add(left, right, split);
    ctx->saved_data["split"] = split;
    return split ? variable_list{first, second} : variable_list{first};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    auto grad = ctx->saved_data["split"].toBool() ? at::cat({grads[0], grads[1]}, 1) : grads[0];
    return {grad, grad, Tensor()};
  }
};

// Public operations ---------------------------------------------------------------------------------------------------

// A forward-mode gradient counts too: autograd then says that there is none here, where it would be lost else.
bool needs_grad(std::initializer_list<const MaybeTensor*> tensors) {
  bool grads = at::GradMode::is_enabled();
  return std::any_of(tensors.begin(), tensors.end(), [&](auto t) {
    return given(*t) && ((grads && (*t)->requires_grad()) || (*t)->_fw_grad(0).defined());
  });
}

// y, or its two halves. `differentiable` is where autograd looks on.
template <bool differentiable>
variable_list outputs_of(const Tensor& x, const MaybeTensor& right, const Norm& norm) {
  MaybeTensor input(x);
  if (differentiable && needs_grad({&input, &right, &norm.weight, &norm.bias})) {
    auto outputs = Normalise::apply(x, right, norm.weight, norm.bias, norm);
    outputs.resize(norm.split ? 2 : 1);
    return outputs;
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  auto [first, second, sum, mean, rstd] = call_normalise(x, right, norm);
  return norm.split ? variable_list{first, second} : variable_list{first};
}

template <bool differentiable, bool activate_first>
Tensor one_input(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
                 const MaybeTensor& running_var, bool training, double momentum, double eps, double slope,
                 bool biased) {
  check_input(x, "x");
  Norm norm{weight, bias, running_mean, running_var, training, momentum, eps, slope, activate_first, biased};
  return outputs_of<differentiable>(x, std::nullopt, norm)[0];
}

// Both branches in the type that PyTorch's own sum of them has.
std::pair<Tensor, Tensor> in_one_type(const Tensor& left, const Tensor& right) {
  check_pair(left, right);
  auto type = at::result_type(left, right);
  return {left.to(type), right.to(type)};
}

template <bool differentiable>
variable_list seam(const Tensor& left, const Tensor& right, const MaybeTensor& weight, const MaybeTensor& bias,
                   const MaybeTensor& running_mean, const MaybeTensor& running_var, bool training, double momentum,
                   double eps, double slope, bool split) {
  auto [x, y] = in_one_type(left, right);
  Norm norm{weight, bias, running_mean, running_var, training, momentum, eps, slope, false, false, split};
  return outputs_of<differentiable>(x, y, norm);
}

template <bool differentiable>
variable_list bare_seam(const Tensor& left, const Tensor& right, bool split) {
  auto [x, y] = in_one_type(left, right);
  check_split(x, split);
  MaybeTensor a(x), b(y);
  if (differentiable && needs_grad({&a, &b})) return Add::apply(x, y, split);
  at::AutoDispatchBelowADInplaceOrView guard;
  auto [first, second] = call_add(x, y, split);
  return split ? variable_list{first, second} : variable_list{first};
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
  m.def("_normalise(Tensor x, Tensor? right, " NORM ", bool activate_first, bool biased, bool split)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_normalise_backward(Tensor first, Tensor? second, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
        "Tensor rstd, bool training, float slope, bool activate_first) -> (Tensor, Tensor, Tensor)");
  m.def("_add(Tensor left, Tensor right, bool split) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gan_ops, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_leaky_relu", one_input<false, false>);
  m.impl("leaky_relu_batch_norm", one_input<false, true>);
  m.impl("split_add_batch_norm_leaky_relu", seam<false>);
  m.impl("split_add", bare_seam<false>);
}

TORCH_LIBRARY_IMPL(gan_ops, Autograd, m) {
  m.impl("batch_norm_leaky_relu", one_input<true, false>);
  m.impl("leaky_relu_batch_norm", one_input<true, true>);
  m.impl("split_add_batch_norm_leaky_relu", seam<true>);
  m.impl("split_add", bare_seam<true>);
}

TORCH_LIBRARY_IMPL(gan_ops, CPU, m) {
  m.impl("_normalise", normalise);
  m.impl("_normalise_backward", normalise_backward);
  m.impl("_add", add);
}

#ifdef GAN_OPS_CUDA
TORCH_LIBRARY_IMPL(gan_ops, CUDA, m) {
  m.impl("_normalise", normalise);
  m.impl("_normalise_backward", normalise_backward);
  m.impl("_add", add);
}
#endif

TORCH_LIBRARY_IMPL(gan_ops, Meta, m) {
  m.impl("_normalise", fake_normalise);
  m.impl("_normalise_backward", fake_normalise_backward);
  m.impl("_add", fake_add);
}

}  // namespace gan_ops

namespace {

PyModuleDef module = {PyModuleDef_HEAD_INIT, "gan_ops",
                      "torch.ops.gan_ops: what stands between two convolutions, as one operation.", -1, nullptr,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_gan_ops() {
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
