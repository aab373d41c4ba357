// Only the bindings*.cpp files know torch and Python; everything else in csrc/ is plain C++ (or CUDA) on raw pointers.
// One `bind_<area>(py::module_&)` per area, called at the end.

#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>

#include "bindings.h"
#include "cache_layout.h"

// ---- build --------------------------------------------------------------------------------------------------------

static py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cxx"] = static_cast<long>(__cplusplus);
  info["torch"] = TORCH_VERSION;
#ifdef COCONUT_FAST_WITH_CUDA
  info["cuda"] = true;
  info["cuda_reason"] = "";
#else
  info["cuda"] = false;
  info["cuda_reason"] = COCONUT_FAST_NO_CUDA_REASON;
#endif
  return info;
}

static void bind_build(py::module_& m) {
  m.def("build_info", &build_info,
        "What this module was built with: compiler, C++ standard, torch version, and whether (or why not) with CUDA.");
}

// ---- cache layout -------------------------------------------------------------------------------------------------

using coconut_fast::CacheLayout;
using Numbers = std::vector<int64_t>;

static std::shared_ptr<CacheLayout> make_layout(int64_t num_pages, int64_t page_size, int64_t max_rows,
                                                std::optional<int64_t> max_pages_per_row) {
  const int64_t fits = std::numeric_limits<int32_t>::max() / std::max<int64_t>(page_size, 1);
  return std::make_shared<CacheLayout>(num_pages, page_size, max_rows,
                                       max_pages_per_row.value_or(std::min(num_pages, fits)));
}

// A tensor over memory of `layout`, which it keeps alive.
static at::Tensor view_of(std::shared_ptr<CacheLayout> layout, int32_t* data, at::IntArrayRef shape) {
  return at::from_blob(data, shape, [layout](void*) {}, at::TensorOptions().dtype(at::kInt));
}

static void check_same_length(const char* operation, const char* name, const Numbers& rows, const Numbers& values) {
  if (rows.size() != values.size()) refuse(operation, ": ", rows.size(), " rows but ", values.size(), " ", name);
}

static py::tuple layout_append(CacheLayout& self, const Numbers& rows, const Numbers& counts) {
  check_same_length("append", "counts", rows, counts);
  const int64_t n = static_cast<int64_t>(rows.size());
  at::Tensor slots = at::empty({self.check_append(rows.data(), counts.data(), n)}, at::kLong);
  std::vector<CacheLayout::Copy> pairs(rows.size());
  pairs.resize(self.append(rows.data(), counts.data(), n, slots.data_ptr<int64_t>(), pairs.data()));
  at::Tensor copies = at::empty({static_cast<int64_t>(pairs.size()), 2}, at::kLong);
  for (size_t i = 0; i < pairs.size(); ++i) {
    copies.data_ptr<int64_t>()[2 * i] = pairs[i].first;
    copies.data_ptr<int64_t>()[2 * i + 1] = pairs[i].second;
  }
  return py::make_tuple(slots, copies);
}

static void bind_cache_layout(py::module_& m) {
  py::class_<CacheLayout, std::shared_ptr<CacheLayout>>(m, "CacheLayout", R"(
Where every row's keys and values lie: pages of `page_size` slots, shared between forks until one of them writes.

Position p of row r is slot `page_table[r, p // page_size] * page_size + p % page_size` of the storage. Every method
raises ValueError, and changes nothing, where it cannot be carried out in full.)")
      .def(py::init(&make_layout), py::arg("num_pages"), py::arg("page_size") = 16, py::arg("max_rows") = 64,
           py::arg("max_pages_per_row") = py::none())
      .def_property_readonly(
          "page_table",
          [](std::shared_ptr<CacheLayout> self) {
            return view_of(self, self->page_table(), {self->max_rows(), self->max_pages_per_row()});
          },
          "int32 (max_rows, max_pages_per_row), the layout's own memory, which never moves; not to be written.")
      .def_property_readonly(
          "lengths",
          [](std::shared_ptr<CacheLayout> self) { return view_of(self, self->lengths(), {self->max_rows()}); },
          "int32 (max_rows,), the layout's own memory, which never moves; not to be written.")
      .def_property_readonly("page_size", &CacheLayout::page_size)
      .def_property_readonly("num_pages", &CacheLayout::num_pages)
      .def_property_readonly("free_pages", &CacheLayout::free_pages)
      .def_property_readonly("max_rows", &CacheLayout::max_rows)
      .def_property_readonly("max_pages_per_row", &CacheLayout::max_pages_per_row)
      .def_property_readonly("rows_in_use", &CacheLayout::rows_in_use, "How many rows are in use.")
      .def(
          "alloc",
          [](CacheLayout& self, int64_t n) {
            Numbers rows(std::clamp<int64_t>(n, 0, self.max_rows()));
            self.alloc(n, rows.data());
            return rows;
          },
          py::arg("n"), "n fresh empty rows.")
      .def("append", &layout_append, py::arg("rows"), py::arg("counts"),
           "Makes room for counts[i] more tokens in rows[i]. Returns slots, int64 (sum(counts),), where they go, row "
           "after row; and copies, int64 (n, 2), pages to copy (from, to) in the storage before anything is written.")
      .def(
          "fork",
          [](CacheLayout& self, const Numbers& rows) {
            Numbers forks(rows.size());
            self.fork(rows.data(), static_cast<int64_t>(rows.size()), forks.data());
            return forks;
          },
          py::arg("rows"), "One new row for each of rows (which may repeat), sharing all its tokens without a copy.")
      .def(
          "truncate",
          [](CacheLayout& self, const Numbers& rows, const Numbers& lengths) {
            check_same_length("truncate", "lengths", rows, lengths);
            self.truncate(rows.data(), lengths.data(), static_cast<int64_t>(rows.size()));
          },
          py::arg("rows"), py::arg("lengths"), "Rolls rows[i] back to its first lengths[i] tokens.")
      .def(
          "free",
          [](CacheLayout& self, const Numbers& rows) {
            self.free(rows.data(), static_cast<int64_t>(rows.size()));
          },
          py::arg("rows"), "Gives rows back; pages that nobody else holds become free.");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ half of coconut_fast: cache layout, CPU kernels, and CUDA kernels where they were built.";
  bind_build(m);
  bind_cache_layout(m);
  bind_attention(m);
  bind_native(m);
  bind_gelu(m);
  bind_gemm(m);
  bind_linear(m);
  bind_memory(m);
  bind_cuda(m);
}
