// Binds the native chain: checks every argument, then makes one call without the GIL.
#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "cache_layout.h"
#include "cpu/chain.h"
#include "cpu/memory.h"

using coconut_fast::CacheLayout;
using coconut_fast::Chain;
using Tensors = std::map<std::string, at::Tensor>;

// The tensor called `name`, or an undefined one.
static at::Tensor find(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? at::Tensor() : found->second;
}

static coconut_fast::Matrix matrix_of(const Tensors& tensors, const std::string& name, int64_t rows, int64_t columns) {
  const at::Tensor t = find(tensors, name);
  if (!t.defined()) refuse("native chain: the tensor ", name, " is missing");
  if (t.dim() != 2 || t.size(0) != rows || t.size(1) != columns || !t.is_cpu() ||
      (t.scalar_type() != at::kFloat && t.scalar_type() != at::kBFloat16))
    refuse("native chain: ", name, " must be a float32 or bfloat16 CPU tensor of shape (", rows, ", ", columns,
           "), found ", describe(t));
  check_plain("native chain", name.c_str(), t);
  const auto dtype = t.scalar_type() == at::kFloat ? coconut_fast::Dtype::f32 : coconut_fast::Dtype::bf16;
  return {t.data_ptr(), dtype, t.stride(0), t.stride(1)};
}

static const float* vector_of(const Tensors& tensors, const std::string& name, int64_t size) {
  const at::Tensor t = find(tensors, name);
  if (!t.defined()) return nullptr;
  if (t.numel() != size || !t.is_cpu() || t.scalar_type() != at::kFloat || !t.is_contiguous())
    refuse("native chain: ", name, " must be a contiguous float32 CPU tensor of ", size, " values, found ",
           describe(t));
  check_plain("native chain", name.c_str(), t);
  return t.data_ptr<float>();
}

static const float* norm_of(const Tensors& tensors, const std::string& name, int64_t size) {
  const float* weight = vector_of(tensors, name, size);
  if (!weight) refuse("native chain: the tensor ", name, " is missing");
  return weight;
}

// A contiguous CPU tensor of exactly this type and number of elements.
template <typename T>
static T* data_of(const at::Tensor& t, int64_t size, const char* name) {
  if (!t.is_cpu() || t.scalar_type() != c10::CppTypeToScalarType<T>::value || !t.is_contiguous() || t.numel() != size)
    refuse(name, " must be a contiguous CPU tensor of ", size, " ", c10::CppTypeToScalarType<T>::value, ", found ",
           describe(t));
  check_plain("native chain", name, t);
  return t.data_ptr<T>();
}

static std::unique_ptr<Chain> make_chain(const py::dict& shape, const std::string& format, int threads,
                                         int max_tokens) {
  static const std::map<std::string, coconut_fast::Format> formats = {
      {"fp32", coconut_fast::Format::fp32}, {"bf16", coconut_fast::Format::bf16}, {"int8", coconut_fast::Format::int8}};
  static const std::map<std::string, coconut_fast::Activation> activations = {
      {"gelu_tanh", coconut_fast::Activation::gelu_tanh},
      {"gelu", coconut_fast::Activation::gelu},
      {"silu", coconut_fast::Activation::silu},
      {"relu", coconut_fast::Activation::relu}};
  if (!formats.count(format)) refuse("format must be fp32, bf16 or int8, found ", format);
  const auto activation = activations.find(shape["activation"].cast<std::string>());
  if (activation == activations.end())
    refuse("activation must be gelu_tanh, gelu, silu or relu, found ", shape["activation"].cast<std::string>());
  const auto number = [&](const char* name) {
    const int found = shape[name].cast<int>();
    if (found < 1) refuse(name, " must be at least 1, found ", found);
    return found;
  };
  const coconut_fast::ChainShape s{number("layers"), number("dim"), number("heads"), number("kv_heads"),
                                   number("head_dim"), number("inner"), number("vocab"), number("max_positions"),
                                   shape["norm"].cast<std::string>() == "layer", shape["eps"].cast<float>(),
                                   activation->second, shape["gated"].cast<bool>(),
                                   shape["rope_scaling"].cast<float>()};
  if (s.heads % s.kv_heads) refuse("kv_heads must divide heads = ", s.heads, ", found ", s.kv_heads);
  if (max_tokens < 1) refuse("max_tokens must be at least 1, found ", max_tokens);
  return std::make_unique<Chain>(s, formats.at(format), threads, max_tokens, coconut_fast::best_isa());
}

static void set_layer(Chain& self, int layer, const Tensors& t, float scaling, int64_t window) {
  const auto& s = self.shape();
  if (layer < 0 || layer >= s.layers) refuse("layer must be from 0 to ", s.layers - 1, ", found ", layer);
  if (window < 0) refuse("window must be 0 (none) or more, found ", window);
  if (window > s.max_positions) window = 0;  // no row is longer
  const int64_t q = int64_t(s.heads) * s.head_dim, all = q + 2 * int64_t(s.kv_heads) * s.head_dim;
  const int64_t up = s.gated ? 2 * s.inner : s.inner;
  self.set_layer(layer, {matrix_of(t, "qkv", all, s.dim), matrix_of(t, "o", s.dim, q), matrix_of(t, "up", up, s.dim),
                         matrix_of(t, "down", s.dim, s.inner), vector_of(t, "qkv_bias", all),
                         vector_of(t, "o_bias", s.dim), vector_of(t, "up_bias", up), vector_of(t, "down_bias", s.dim),
                         norm_of(t, "norm1", s.dim), vector_of(t, "norm1_bias", s.dim), norm_of(t, "norm2", s.dim),
                         vector_of(t, "norm2_bias", s.dim), vector_of(t, "q_norm", s.head_dim),
                         vector_of(t, "k_norm", s.head_dim), scaling, static_cast<int>(window)});
}

static void set_embeddings(Chain& self, const Tensors& t) {
  const auto& s = self.shape();
  const coconut_fast::Matrix none;
  self.set_embeddings({matrix_of(t, "embed", s.vocab, s.dim),
                 t.count("positions") ? matrix_of(t, "positions", s.max_positions, s.dim) : none,
                 matrix_of(t, "head", s.vocab, s.dim), vector_of(t, "head_bias", s.vocab),
                 norm_of(t, "final_norm", s.dim), vector_of(t, "final_norm_bias", s.dim),
                 vector_of(t, "inv_freq", s.head_dim / 2)});
}

static void set_feedback(Chain& self, float norm, const std::optional<at::Tensor>& constant) {
  self.set_feedback(norm, constant ? data_of<float>(*constant, self.shape().dim, "constant") : nullptr);
}

// The storage of a KVCache, checked against the chain and the rows of a call.
static coconut_fast::CacheView cache_view(const Chain& chain, const CacheLayout& layout,
                                          const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values) {
  const auto& s = chain.shape();
  if (!chain.ready())
    refuse("native chain: not every weight is set; expected set_layer of all ", s.layers, " layers and set_embeddings");
  if (static_cast<int>(keys.size()) != s.layers || keys.size() != values.size())
    refuse("cache: expected ", s.layers, " layers, found ", keys.size());
  const auto type = keys[0].scalar_type();
  if (type != at::kFloat && type != at::kBFloat16)
    refuse("cache: must be float32 or bfloat16, found ", type);
  const int64_t slots = layout.num_pages() * layout.page_size();
  coconut_fast::CacheView view{{}, {}, type == at::kFloat ? coconut_fast::Dtype::f32 : coconut_fast::Dtype::bf16,
                               layout.page_table(), layout.max_pages_per_row(), layout.page_size()};
  for (const auto* side : {&keys, &values})
    for (const at::Tensor& t : *side) {
      if (!t.is_cpu() || t.scalar_type() != type || !t.is_contiguous() || t.dim() != 3 || t.size(0) < slots ||
          t.size(1) != s.kv_heads || t.size(2) != s.head_dim)
        refuse("cache: expected contiguous CPU tensors of one dtype and shape (", slots, ", ", s.kv_heads, ", ",
               s.head_dim, "), found ", describe(t));
      check_plain("native chain", "cache", t);
      (side == &keys ? view.keys : view.values).push_back(t.data_ptr());
    }
  return view;
}

// Rows and starts of a call; row i must already have `counts[i]` places in the cache from its start on.
static coconut_fast::RowsView rows_view(const Chain& chain, const CacheLayout& layout, const at::Tensor& rows,
                                        const at::Tensor& starts, const int32_t* counts) {
  const int64_t n = rows.numel();
  const int32_t *row = data_of<int32_t>(rows, n, "rows"), *start = data_of<int32_t>(starts, n, "starts");
  for (int64_t i = 0; i < n; ++i) {
    const int64_t end = start[i] + int64_t(counts[i]);
    if (row[i] < 0 || row[i] >= layout.max_rows()) refuse("row ", row[i], " is not a row of the cache");
    if (counts[i] < 0) refuse("row ", row[i], ": the count must not be negative, found ", counts[i]);
    if (start[i] < 0 || end > layout.lengths()[row[i]])
      refuse("row ", row[i], ": tokens ", start[i], " to ", end, " are not within the ", layout.lengths()[row[i]],
             " places it has in the cache");
    if (end > chain.shape().max_positions)
      refuse("row ", row[i], ": needs position ", end, ", the model has ", chain.shape().max_positions);
  }
  return {static_cast<int>(n), row, start};
}

// -1, which stands for a thought or for no token, is allowed.
static void check_ids(const Chain& chain, const int32_t* ids, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < -1 || ids[i] >= chain.shape().vocab)
      refuse("token id ", ids[i], " is out of range, the vocabulary has ", chain.shape().vocab);
}

using Storage = std::vector<at::Tensor>;

static void chain_prefill(Chain& self, const CacheLayout& layout, const Storage& keys, const Storage& values,
                          const at::Tensor& rows, const at::Tensor& starts, const at::Tensor& ids,
                          const at::Tensor& counts, at::Tensor hidden) {
  const auto cache = cache_view(self, layout, keys, values);
  const int64_t n = rows.numel();
  const int32_t* count = data_of<int32_t>(counts, n, "counts");
  const auto view = rows_view(self, layout, rows, starts, count);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += count[i];
  const int32_t* id = data_of<int32_t>(ids, total, "ids");
  check_ids(self, id, total);
  float* state = data_of<float>(hidden, n * self.shape().dim, "hidden");
  py::gil_scoped_release release;
  self.prefill(cache, view, id, count, state);
}

static void chain_think(Chain& self, const CacheLayout& layout, const Storage& keys, const Storage& values,
                        const at::Tensor& rows, const at::Tensor& starts, const at::Tensor& counts, at::Tensor hidden,
                        std::optional<at::Tensor> thoughts) {
  const auto cache = cache_view(self, layout, keys, values);
  const int64_t n = rows.numel();
  const int32_t* count = data_of<int32_t>(counts, n, "counts");
  const auto view = rows_view(self, layout, rows, starts, count);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += count[i];
  float* state = data_of<float>(hidden, n * self.shape().dim, "hidden");
  float* fed = thoughts ? data_of<float>(*thoughts, total * self.shape().dim, "thoughts") : nullptr;
  py::gil_scoped_release release;
  self.think(cache, view, count, state, fed);
}

static py::tuple chain_decode(Chain& self, const CacheLayout& layout, const Storage& keys, const Storage& values,
                              const at::Tensor& rows, const at::Tensor& starts, const at::Tensor& pending,
                              const at::Tensor& limits, int steps, const std::vector<int32_t>& stops,
                              float temperature, int top_k, float top_p, const at::Tensor& seeds,
                              const at::Tensor& first_steps, at::Tensor hidden) {
  const auto cache = cache_view(self, layout, keys, values);
  const int64_t n = rows.numel();
  const int32_t* first = data_of<int32_t>(pending, n, "pending");
  const int32_t* limit = data_of<int32_t>(limits, n, "limits");
  check_ids(self, first, n);
  std::vector<int32_t> writes(n);  // a row's last token is not written to the cache, a pending one is
  for (int64_t i = 0; i < n; ++i) {
    const int made = std::min(limit[i], steps);
    writes[i] = made <= 0 ? std::min(made, 0) : made - (first[i] < 0);
  }
  const auto view = rows_view(self, layout, rows, starts, writes.data());
  float* state = data_of<float>(hidden, n * self.shape().dim, "hidden");
  at::Tensor tokens = at::full({n, steps}, -1, at::kInt), produced = at::zeros({n}, at::kInt);
  const coconut_fast::DecodeRequest request{
      steps, first, limit, stops.data(), static_cast<int>(stops.size()), temperature, top_p, top_k,
      reinterpret_cast<const uint64_t*>(data_of<int64_t>(seeds, n, "seeds")),
      data_of<int32_t>(first_steps, n, "first_steps"), tokens.data_ptr<int32_t>(), produced.data_ptr<int32_t>()};
  {
    py::gil_scoped_release release;
    self.decode(cache, view, request, state);
  }
  return py::make_tuple(tokens, produced);
}

void bind_native(py::module_& m) {
  m.def("isa", [] { return coconut_fast::isa_name(coconut_fast::best_isa()); },
        "The instruction set the CPU kernels use: the machine's best, or COCONUT_FAST_ISA.");
  m.def("has_tiles", &coconut_fast::has_tiles, "Whether COCONUT_FAST_ISA=amx can be asked for here.");
  m.def("read_bandwidth", &coconut_fast::read_bandwidth, py::arg("threads"), py::arg("bytes"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>(), "Bytes per second that `threads` threads read from memory.");
  py::class_<Chain>(m, "NativeChain", R"(
A model of a known family from packed weights; see csrc/cpu/chain.h, and infer/native.py, which is its only caller.

hidden is float32 (rows, dim), read and written in place; other arrays are int32, seeds int64. The rows' new tokens must
have been appended to the layout before.)")
      .def(py::init(&make_chain), py::arg("shape"), py::arg("format"), py::arg("threads"), py::arg("max_tokens"))
      .def("set_threads", &Chain::set_threads, py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def("set_layer", &set_layer, py::arg("layer"), py::arg("tensors"), py::arg("scaling"), py::arg("window"))
      .def("set_embeddings", &set_embeddings, py::arg("tensors"))
      .def("set_feedback", &set_feedback, py::arg("norm"), py::arg("constant"))
      .def("prefill", &chain_prefill, py::arg("layout"), py::arg("keys"), py::arg("values"), py::arg("rows"),
           py::arg("starts"), py::arg("ids"), py::arg("counts"), py::arg("hidden"))
      .def("think", &chain_think, py::arg("layout"), py::arg("keys"), py::arg("values"), py::arg("rows"),
           py::arg("starts"), py::arg("counts"), py::arg("hidden"), py::arg("thoughts") = py::none())
      .def("decode", &chain_decode, py::arg("layout"), py::arg("keys"), py::arg("values"), py::arg("rows"),
           py::arg("starts"), py::arg("pending"), py::arg("limits"), py::arg("steps"), py::arg("stops"),
           py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("seeds"), py::arg("first_steps"),
           py::arg("hidden"))
      .def_property_readonly("isa", [](const Chain& self) { return coconut_fast::isa_name(self.isa()); })
      .def_property_readonly("threads", &Chain::threads)
      .def_property_readonly("body_bytes", &Chain::body_bytes, "Bytes of weights a latent pass reads.")
      .def_property_readonly("head_bytes", &Chain::head_bytes, "Bytes of weights a token needs besides.");
}
