// Binds the matrix products of a training step on CPU; kernels/reference.py says what they compute.

#include <ATen/Parallel.h>

#include "bindings.h"
#include "cpu/gemm.h"

using namespace coconut_fast;

constexpr int64_t kGrain = 1 << 20;  // multiply-adds; less is not worth waking a thread
constexpr int64_t kPacked = 32;       // multiply-adds that take as long as packing one value

static Dtype check(const char* op, const char* name, const at::Tensor& x) {
  if (!gemm_runs()) refuse(op, ": needs a CPU with AVX512-BF16 and without AMX");
  const auto dtype = dtype_of(op, name, x);
  if ((dtype != Dtype::f32 && dtype != Dtype::bf16) || !x.device().is_cpu() || x.dim() != 2)
    refuse(op, ": ", name, " is ", describe(x), "; expected a matrix of Float or BFloat16 on the CPU");
  check_plain(op, name, x);
  return dtype;
}

// `task(i)` for i < tasks, each of `work` multiply-adds.
template <typename Task>
static void deal(int64_t tasks, int64_t work, const Task& task) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  at::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) task(i);
  });
}

static const char* bytes(const at::Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

static at::Tensor pack_matrix(const at::Tensor& matrix, at::ScalarType type) {
  const auto from = check("pack_matrix", "matrix", matrix);
  if (type != at::kFloat && type != at::kBFloat16)
    refuse("pack_matrix: dtype is ", type, "; expected Float or BFloat16");
  const auto to = type == at::kFloat ? Dtype::f32 : Dtype::bf16;
  const int64_t k = matrix.size(0), n = matrix.size(1), panel = panel_bytes(to, k);
  at::Tensor packed = at::empty({panels_of(n), panel / size_of(to)}, matrix.options().dtype(type));
  const Matrix w{matrix.const_data_ptr(), from, matrix.stride(0), matrix.stride(1)};
  auto* data = static_cast<char*>(packed.mutable_data_ptr());
  py::gil_scoped_release release;
  deal(panels_of(n), k * kPanelColumns * kPacked, [&](int64_t i) { pack_panel(w, k, n, i, to, data + i * panel); });
  return packed;
}

static at::Tensor packed_matmul(const at::Tensor& x, const at::Tensor& packed, int64_t n,
                                const std::optional<at::Tensor>& bias) {
  const auto dtype = check("packed_matmul", "x", x);
  const int64_t rows = x.size(0), k = x.size(1);
  check_type("packed_matmul", "packed", packed, x.scalar_type());
  check_shape("packed_matmul", "packed", packed, {panels_of(n), panel_bytes(dtype, k) / size_of(dtype)});
  if (dtype == Dtype::bf16 && k % 2)
    refuse("packed_matmul: x has ", k, " columns; expected an even number in BFloat16");
  if (bias) {
    check_type("packed_matmul", "bias", *bias, x.scalar_type());
    check_shape("packed_matmul", "bias", *bias, {n});
  }
  const at::Tensor inputs = x.contiguous();
  at::Tensor y = at::empty({rows, n}, x.options());
  const Product product{bytes(inputs), bytes(packed), bias ? bytes(*bias) : nullptr,
                        static_cast<char*>(y.mutable_data_ptr()), dtype, rows, k, n};
  py::gil_scoped_release release;
  deal(product.tasks(), product.first_row(1) * k * kPanelColumns, [&](int64_t i) { multiply(product, i); });
  return y;
}

static at::Tensor few_rows_matmul(const at::Tensor& x, const at::Tensor& matrix,
                                  const std::optional<at::Tensor>& bias) {
  if (check("few_rows_matmul", "x", x) != Dtype::f32) refuse("few_rows_matmul: x is ", describe(x), "; expected Float");
  check("few_rows_matmul", "matrix", matrix);
  check_type("few_rows_matmul", "matrix", matrix, at::kFloat);
  const int64_t rows = x.size(0), k = x.size(1), n = matrix.size(1);
  if (matrix.size(0) != k) refuse("few_rows_matmul: matrix is ", describe(matrix), "; expected ", k, " rows");
  if (bias) {
    check_type("few_rows_matmul", "bias", *bias, at::kFloat);
    check_shape("few_rows_matmul", "bias", *bias, {n});
  }
  const at::Tensor inputs = x.contiguous();
  const at::Tensor w = matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
  if (!k) return bias ? bias->expand({rows, n}).clone() : at::zeros({rows, n}, x.options());
  at::Tensor y = at::empty({rows, n}, x.options());
  const Few product{inputs.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr,
                    {w.const_data_ptr(), Dtype::f32, w.stride(0), w.stride(1)},
                    y.mutable_data_ptr<float>(), rows, k, n};
  py::gil_scoped_release release;
  at::parallel_for(0, panels_of(n), std::max<int64_t>(1, kGrain / (std::max<int64_t>(1, rows) * k * kPanelColumns)),
                   [&](int64_t first, int64_t last) { multiply(product, first, last); });
  return y;
}

static at::Tensor weight_gradient(const at::Tensor& left, const at::Tensor& right,
                                  const std::optional<at::Tensor>& into,
                                  const std::optional<at::Tensor>& column_sums) {
  const auto dtype = check("weight_gradient", "left", left);
  check("weight_gradient", "right", right);
  check_type("weight_gradient", "right", right, left.scalar_type());
  const int64_t rows = left.size(0), m = left.size(1), n = right.size(1);
  if (right.size(0) != rows)
    refuse("weight_gradient: left is ", describe(left), ", right ", describe(right), "; expected as many rows");
  if (into) {
    check_type("weight_gradient", "into", *into, at::kFloat);
    check_shape("weight_gradient", "into", *into, {m, n});
  }
  if (column_sums) {
    check_type("weight_gradient", "column_sums", *column_sums, at::kFloat);
    check_shape("weight_gradient", "column_sums", *column_sums, {n});
  }
  at::Tensor total = into ? *into : at::empty({m, n}, left.options().dtype(at::kFloat));
  const at::Tensor lefts = left.contiguous(), rights = right.contiguous();
  // Blocks of equal and even length: an odd one would end in half a bf16 step. At least one block, to write zeros.
  const int64_t blocks = std::max<int64_t>(1, (rows + gradient_rows(dtype) - 1) / gradient_rows(dtype));
  const int64_t block = ((rows + blocks - 1) / blocks + 1) / 2 * 2;
  Gradient gradient{nullptr, nullptr, total.mutable_data_ptr<float>(), nullptr, nullptr, dtype, block, m, n, !into};
  at::Tensor gathered = at::empty({gradient.gathered_bytes()}, at::kByte);
  gradient.gathered = static_cast<char*>(gathered.mutable_data_ptr());
  if (column_sums) gradient.column_sums = column_sums->mutable_data_ptr<float>();
  const int64_t panel = panel_bytes(dtype, block);
  at::Tensor panels = at::empty({at::get_num_threads(), panel}, at::kByte);
  auto* panels_data = static_cast<char*>(panels.mutable_data_ptr());
  py::gil_scoped_release release;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = b * block;
    gradient.left = bytes(lefts) + row * m * size_of(dtype);
    gradient.right = bytes(rights) + row * n * size_of(dtype);
    gradient.rows = std::min(block, rows - row);
    deal(gradient.gather_tasks(), gradient.rows * gradient.gather_columns() * kPacked,
         [&](int64_t i) { gather(gradient, i); });
    deal(gradient.add_tasks(), gradient.rows * m * kPanelColumns,
         [&](int64_t i) { add(gradient, i, panels_data + at::get_thread_num() * panel); });
    gradient.first = false;
  }
  return total;
}

void bind_gemm(py::module_& m) {
  m.def("gemm_runs", &gemm_runs, "Whether this machine runs the functions below: AVX512-BF16 and no AMX.");
  m.def("pack_matrix", &pack_matrix, py::arg("matrix"), py::arg("dtype"),
        "A matrix (K, N) in any layout, fp32 or bf16, as packed_matmul wants it in `dtype`: (panels, values of one).");
  m.def("packed_matmul", &packed_matmul, py::arg("x"), py::arg("packed"), py::arg("n"), py::arg("bias") = py::none(),
        "x (M, K) times pack_matrix(a matrix (K, n)) plus bias (n,) -> (M, n); all of one dtype.");
  m.def("few_rows_matmul", &few_rows_matmul, py::arg("x"), py::arg("matrix"), py::arg("bias") = py::none(),
        "x (M, K) times a matrix (K, N) in any layout plus bias (N,) -> (M, N); fp32.");
  m.def("weight_gradient", &weight_gradient, py::arg("left"), py::arg("right"), py::arg("into") = py::none(),
        py::arg("column_sums") = py::none(),
        "left (M, K) transposed times right (M, N) -> fp32 (K, N), or added to `into` in place; the sums of right's "
        "columns to column_sums, fp32 (N,): added where there is an `into`, else written.");
}
