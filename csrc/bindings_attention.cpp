// Binds ragged_attention, ragged_attention_backward and kv_append on CPU; kernels/reference.py says what they compute.

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "bindings.h"
#include "cpu/attention.h"
#include "cpu/kv_append.h"

using coconut_fast::Dtype;

// The ragged batch and the keywords of both attention ops.
struct RaggedArguments {
  at::Tensor query, keys, values, page_table, rows, row_offsets, lengths;
  int64_t page_size, window, max_query, max_length;
  double scaling, softcap, dropout;
  int64_t seed;
};

// Refuses everything that could make the kernels read outside the tensors.
static coconut_fast::Attention check_attention(const char* op, const RaggedArguments& r) {
  check_shape(op, "query", r.query, {-1, -1, -1});
  check_shape(op, "keys", r.keys, {-1, -1, r.query.size(2)});
  check_shape(op, "values", r.values, {r.keys.size(0), r.keys.size(1), -1});
  check_shape(op, "page_table", r.page_table, {-1, -1});
  check_shape(op, "rows", r.rows, {-1});
  check_shape(op, "row_offsets", r.row_offsets, {r.rows.size(0) + 1});
  check_shape(op, "lengths", r.lengths, {r.rows.size(0)});
  check_type(op, "page_table", r.page_table, at::kInt);
  check_type(op, "rows", r.rows, at::kInt);
  check_type(op, "row_offsets", r.row_offsets, at::kInt);
  check_type(op, "lengths", r.lengths, at::kInt);
  check_type(op, "values", r.values, r.keys.scalar_type());
  const int64_t heads = r.query.size(1), kv_heads = r.keys.size(1), tokens = r.query.size(0);
  if (kv_heads == 0 || heads % kv_heads != 0) refuse(op, ": ", heads, " query heads over ", kv_heads, " kv heads");
  if (r.page_size < 1 || r.keys.size(0) % r.page_size != 0)
    refuse(op, ": page_size is ", r.page_size, ", keys have ", r.keys.size(0), " slots; expected whole pages");
  if (!(r.dropout >= 0 && r.dropout < 1)) refuse(op, ": dropout is ", r.dropout, "; expected 0 <= dropout < 1");
  if (r.window < 0) refuse(op, ": window is ", r.window, "; expected 0 (none) or more");
  if (!(r.softcap >= 0)) refuse(op, ": softcap is ", r.softcap, "; expected 0 (none) or more");
  const Dtype query_dtype = dtype_of(op, "query", r.query), cache_dtype = dtype_of(op, "keys", r.keys);
  if ((query_dtype == Dtype::f64) != (cache_dtype == Dtype::f64))
    refuse(op, ": query is ", r.query.scalar_type(), " and keys are ", r.keys.scalar_type(),
           "; Double goes with Double");

  const auto *rows = r.rows.const_data_ptr<int32_t>(), *offsets = r.row_offsets.const_data_ptr<int32_t>();
  const auto *lengths = r.lengths.const_data_ptr<int32_t>(), *pages = r.page_table.const_data_ptr<int32_t>();
  const int64_t batch = r.rows.size(0), width = r.page_table.size(1), num_pages = r.keys.size(0) / r.page_size;
  if (offsets[0] != 0 || offsets[batch] != tokens)
    refuse(op, ": row_offsets go from ", offsets[0], " to ", offsets[batch], "; expected 0 to ", tokens,
           " (the queries)");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = offsets[b + 1] - offsets[b], length = lengths[b];
    if (rows[b] < 0 || rows[b] >= r.page_table.size(0))
      refuse(op, ": rows[", b, "] is ", rows[b], "; page_table has ", r.page_table.size(0), " rows");
    if (n < 0 || n > r.max_query)
      refuse(op, ": row ", b, " has ", n, " queries; expected 0 to max_query = ", r.max_query);
    if (length < n || length > r.max_length || length > width * r.page_size)
      refuse(op, ": lengths[", b, "] is ", length, "; expected at least its ", n, " queries, at most max_length = ",
             r.max_length, " and the ", width * r.page_size, " that page_table has room for");
    for (int64_t p = 0; p * r.page_size < length; ++p)
      if (const int32_t page = pages[rows[b] * width + p]; page < 0 || page >= num_pages)
        refuse(op, ": page ", p, " of row ", b, " is ", page, "; the cache has ", num_pages, " pages");
  }
  return {.query = r.query.const_data_ptr(),
          .keys = r.keys.const_data_ptr(),
          .values = r.values.const_data_ptr(),
          .page_table = pages,
          .rows = rows,
          .offsets = offsets,
          .lengths = lengths,
          .query_dtype = query_dtype,
          .cache_dtype = cache_dtype,
          .batch = batch,
          .heads = heads,
          .kv_heads = kv_heads,
          .key_dim = r.query.size(2),
          .value_dim = r.values.size(2),
          .pages_per_row = width,
          .page_size = r.page_size,
          // Positions are int32: a longer window excludes no key, and the kernels compare in int32.
          .window = r.window > std::numeric_limits<int32_t>::max() ? 0 : r.window,
          .scaling = r.scaling,
          .softcap = r.softcap,
          .dropout = r.dropout,
          .seed = static_cast<uint64_t>(r.seed)};
}

// torch's own threads.
static coconut_fast::Parallel torch_threads() {
  return {at::get_num_threads(), [](int64_t workers, const std::function<void()>& work) {
            at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
              for (; first < last; ++first) work();
            });
          }};
}

static at::ScalarType sum_type(const at::Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

static py::tuple ragged_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                                  const at::Tensor& page_table, const at::Tensor& rows, const at::Tensor& row_offsets,
                                  const at::Tensor& lengths, int64_t page_size, double scaling, int64_t window,
                                  double softcap, double dropout, int64_t seed, int64_t max_query, int64_t max_length) {
  const RaggedArguments r{query,     keys,   values,    page_table, rows,    row_offsets, lengths, page_size,
                          window,    max_query, max_length, scaling,    softcap, dropout,     seed};
  const auto attention = check_attention("ragged_attention", r);
  at::Tensor out = at::empty({query.size(0), query.size(1), values.size(2)}, query.options().requires_grad(false));
  at::Tensor lse = at::empty({query.size(0), query.size(1)}, out.options().dtype(sum_type(query)));
  void *out_data = out.mutable_data_ptr(), *lse_data = lse.mutable_data_ptr();
  {
    py::gil_scoped_release release;
    coconut_fast::attention_forward(attention, out_data, lse_data, torch_threads());
  }
  return py::make_tuple(out, lse);
}

static at::Tensor ragged_attention_backward(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& keys,
                                            const at::Tensor& values, const at::Tensor& out, const at::Tensor& lse,
                                            const at::Tensor& page_table, const at::Tensor& rows,
                                            const at::Tensor& row_offsets, const at::Tensor& lengths,
                                            const at::Tensor& grad_keys, const at::Tensor& grad_values,
                                            const std::optional<at::Tensor>& grads_from, int64_t page_size,
                                            double scaling, int64_t window, double softcap, double dropout,
                                            int64_t seed, int64_t max_query, int64_t max_length) {
  const char* op = "ragged_attention_backward";
  const RaggedArguments r{query,     keys,   values,    page_table, rows,    row_offsets, lengths, page_size,
                          window,    max_query, max_length, scaling,    softcap, dropout,     seed};
  const auto attention = check_attention(op, r);
  const std::vector<int64_t> out_shape = {query.size(0), query.size(1), values.size(2)};
  check_shape(op, "grad_out", grad_out, out_shape);
  check_shape(op, "out", out, out_shape);
  check_shape(op, "lse", lse, {query.size(0), query.size(1)});
  check_shape(op, "grad_keys", grad_keys, keys.sizes().vec());
  check_shape(op, "grad_values", grad_values, values.sizes().vec());
  check_type(op, "grad_out", grad_out, query.scalar_type());
  check_type(op, "out", out, query.scalar_type());
  check_type(op, "lse", lse, sum_type(query));
  check_type(op, "grad_keys", grad_keys, sum_type(query));
  check_type(op, "grad_values", grad_values, sum_type(query));
  if (grads_from) {
    check_type(op, "grads_from", *grads_from, at::kInt);
    check_shape(op, "grads_from", *grads_from, {rows.size(0)});
  }
  at::Tensor grad_query = at::empty(query.sizes(), query.options().requires_grad(false));
  const coconut_fast::AttentionGrads grads{.grad_out = grad_out.const_data_ptr(),
                                           .out = out.const_data_ptr(),
                                           .lse = lse.const_data_ptr(),
                                           .grad_query = grad_query.mutable_data_ptr(),
                                           .grad_keys = grad_keys.mutable_data_ptr(),
                                           .grad_values = grad_values.mutable_data_ptr(),
                                           .grads_from = grads_from ? grads_from->const_data_ptr<int32_t>() : nullptr};
  py::gil_scoped_release release;
  coconut_fast::attention_backward(attention, grads, torch_threads());
  return grad_query;
}

static void kv_append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& slots, const at::Tensor& keys,
                      const at::Tensor& values, const py::kwargs& turns) {
  const char* op = "kv_append";
  for (const auto& [name, given] : turns)  // eps alone has no effect
    if (!given.is_none() && name.cast<std::string>() != "eps")
      refuse(op, ": ", name.cast<std::string>(), " is given, which the CPU's own kernel does not take (it copies keys "
             "and values as they are); expected none, or backend=\"torch\"");
  check_shape(op, "keys", keys, {-1, -1, -1});
  check_shape(op, "values", values, {keys.size(0), keys.size(1), -1});
  check_shape(op, "slots", slots, {-1});
  check_type(op, "slots", slots, at::kLong);
  const auto* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < slots.size(0); ++i)
    if (slot[i] >= keys.size(0))
      refuse(op, ": slots[", i, "] is ", slot[i], "; the cache has ", keys.size(0), " slots");
  auto copy = [&](const char* from_name, const at::Tensor& from, const char* to_name, const at::Tensor& to) {
    const std::vector<int64_t> shape = {slots.size(0), to.size(1), to.size(2)};
    if (!from.device().is_cpu() || from.sizes() != at::IntArrayRef(shape) || (from.size(2) > 1 && from.stride(2) != 1))
      refuse(op, ": ", from_name, " is ", describe(from), "; expected a CPU tensor of shape ", at::IntArrayRef(shape),
             " whose last dimension is contiguous");
    check_plain(op, from_name, from);
    return coconut_fast::KvAppend{.from = from.const_data_ptr(),
                                  .from_dtype = dtype_of(op, from_name, from),
                                  .token = from.stride(0),
                                  .head = from.stride(1),
                                  .to = to.mutable_data_ptr(),
                                  .to_dtype = dtype_of(op, to_name, to),
                                  .heads = to.size(1),
                                  .dim = to.size(2)};
  };
  const coconut_fast::KvAppend copies[] = {copy("key", key, "keys", keys), copy("value", value, "values", values)};
  py::gil_scoped_release release;
  for (const auto& c : copies) {
    const int64_t grain = std::max<int64_t>(1, (1 << 16) / (c.heads * c.dim + 1));  // less is not worth waking a thread
    at::parallel_for(0, slots.size(0), grain,
                     [&](int64_t first, int64_t last) { coconut_fast::kv_append(c, slot, first, last); });
  }
}

void bind_attention(py::module_& m) {
  m.def("ragged_attention", &ragged_attention, py::arg("query"), py::arg("keys"), py::arg("values"),
        py::arg("page_table"), py::arg("rows"), py::arg("row_offsets"), py::arg("lengths"), py::kw_only(),
        py::arg("page_size"), py::arg("scaling"), py::arg("window") = 0, py::arg("softcap") = 0.0,
        py::arg("dropout") = 0.0, py::arg("seed") = 0, py::arg("max_query"), py::arg("max_length"),
        "kernels/reference.py: ragged_attention_ref, on CPU. ValueError where the arguments do not fit together.");
  m.def("ragged_attention_backward", &ragged_attention_backward, py::arg("grad_out"), py::arg("query"),
        py::arg("keys"), py::arg("values"), py::arg("out"), py::arg("lse"), py::arg("page_table"), py::arg("rows"),
        py::arg("row_offsets"), py::arg("lengths"), py::arg("grad_keys"), py::arg("grad_values"), py::kw_only(),
        py::arg("grads_from") = py::none(), py::arg("page_size"), py::arg("scaling"), py::arg("window") = 0,
        py::arg("softcap") = 0.0, py::arg("dropout") = 0.0, py::arg("seed") = 0, py::arg("max_query"),
        py::arg("max_length"),
        "kernels/reference.py: ragged_attention_backward_ref, on CPU.");
  m.def("kv_append", &kv_append, py::arg("key"), py::arg("value"), py::arg("slots"), py::arg("keys"),
        py::arg("values"), "kernels/reference.py: kv_append_ref, on CPU, without norms, rotary embedding and query.");
}
