// Runs the native chain without Python: prompts, thoughts, tokens, and one attention backward, of random weights that
// are the same everywhere. Prints what came out, line by line `name value ...`, and what each call allocated.
// test_portable.py compiles it for this machine and for Arm.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "cache_layout.h"
#include "cpu/attention.h"
#include "cpu/chain.h"
#include "cpu/isa.h"

namespace {

long allocations = 0;

}  // namespace

void* operator new(size_t bytes) {
  __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
  if (void* p = std::malloc(bytes)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace coconut_fast {
namespace {

constexpr int kLayers = 2, kHeads = 4, kHeadDim = 24, kDim = kHeads * kHeadDim, kInner = 136, kVocab = 211;
constexpr int kRows = 5, kPositions = 96;

// Numbers in [-1, 1) by splitmix64.
struct Numbers {
  uint64_t seed;
  float next() { return static_cast<float>(2 * uniform(seed, step++) - 1); }
  std::vector<float> many(size_t n, float scale, float shift = 0) {
    std::vector<float> values(n);
    for (float& x : values) x = shift + scale * next();
    return values;
  }
  uint64_t step = 0;
};

void print(const char* what, const std::string& of, const float* values, size_t n) {
  std::printf("%s %s", of.c_str(), what);
  for (size_t i = 0; i < n; ++i) std::printf(" %.9g", values[i]);
  std::printf("\n");
}

// A matrix in the type of its format, and its values.
struct Weights {
  std::vector<float> wide;
  std::vector<uint16_t> half;
  Matrix matrix;
  Weights(Numbers& numbers, int n, int k, Format format) : wide(numbers.many(size_t(n) * k, 2 / std::sqrt(float(k)))) {
    for (float x : wide) half.push_back(f32_to_bf16(x));
    const bool is_half = format == Format::bf16;
    matrix = {is_half ? static_cast<void*>(half.data()) : wide.data(), is_half ? Dtype::bf16 : Dtype::f32, k, 1};
  }
};

void run_chain(const std::string& name, bool llama, Format format, int threads) {
  Numbers numbers{uint64_t(llama ? 7 : 3)};
  const int kv_heads = llama ? 2 : kHeads, q = kHeads * kHeadDim, kv = kv_heads * kHeadDim;
  const ChainShape shape{kLayers, kDim, kHeads, kv_heads, kHeadDim, kInner, kVocab, kPositions, !llama, 1e-5f,
                         llama ? Activation::silu : Activation::gelu_tanh, llama, 1.0f};
  Chain chain(shape, format, threads, 64, best_isa());
  for (int layer = 0; layer < kLayers; ++layer) {
    const Weights qkv(numbers, q + 2 * kv, kDim, format), o(numbers, kDim, q, format);
    const Weights up(numbers, llama ? 2 * kInner : kInner, kDim, format), down(numbers, kDim, kInner, format);
    const auto bias = numbers.many(4 * kDim, 0.1f), norm = numbers.many(4 * kDim, 0.1f, 1);
    const float *b = bias.data(), *n = norm.data();
    const float* head_norm = llama ? n + 2 * kDim : nullptr;
    chain.set_layer(layer, {qkv.matrix, o.matrix, up.matrix, down.matrix, b, llama ? nullptr : b + 7, nullptr, nullptr,
                            n, llama ? nullptr : b + 11, n + kDim, llama ? nullptr : b + 13, head_norm, head_norm,
                            1 / std::sqrt(float(kHeadDim)), llama ? 9 : 0});
  }
  const Weights embed(numbers, kVocab, kDim, format), positions(numbers, kPositions, kDim, format);
  const auto norm = numbers.many(kDim, 0.1f, 1);
  std::vector<float> frequencies;
  for (int i = 0; i < kHeadDim / 2; ++i) frequencies.push_back(std::pow(10000.0f, -2.0f * i / kHeadDim));
  chain.set_embeddings({embed.matrix, llama ? Matrix{} : positions.matrix, embed.matrix, nullptr, norm.data(), nullptr,
                        llama ? frequencies.data() : nullptr});

  CacheLayout layout(kRows * 6, 16, kRows, 6);
  int64_t rows64[kRows];
  layout.alloc(kRows, rows64);
  const bool half = format == Format::bf16;
  const size_t slots = size_t(layout.num_pages()) * 16;
  std::vector<std::vector<float>> storage(2 * kLayers, std::vector<float>(slots * kv, NAN));
  CacheView cache{{}, {}, half ? Dtype::bf16 : Dtype::f32, layout.page_table(), 6, 16};
  for (int layer = 0; layer < kLayers; ++layer) {
    cache.keys.push_back(storage[2 * layer].data());
    cache.values.push_back(storage[2 * layer + 1].data());
  }

  int32_t rows[kRows], starts[kRows];
  std::vector<int64_t> places(kRows * kPositions);
  CacheLayout::Copy copies[kRows];
  const auto extend = [&](const int32_t* counts) {
    int64_t wanted[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = rows64[i], starts[i] = layout.lengths()[rows64[i]], wanted[i] = counts[i];
    layout.append(rows64, wanted, kRows, places.data(), copies);
    return RowsView{kRows, rows, starts};
  };
  const auto report = [&](const char* call, long before) {
    std::printf("%s allocations-%s %ld\n", name.c_str(), call, allocations - before);
  };

  std::vector<float> hidden(kRows * kDim), thoughts;
  const int32_t lengths[kRows] = {70, 1, 17, 33, 5}, passes[kRows] = {3, 5, 0, 1, 6};
  std::vector<int32_t> ids;
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < lengths[i]; ++j) ids.push_back((31 * i + 7 * j + 5) % kVocab);
  auto view = extend(lengths);
  chain.prefill(cache, view, ids.data(), lengths, hidden.data());
  print("prefill", name, hidden.data(), hidden.size());

  view = extend(passes);
  thoughts.resize(15 * kDim);
  long before = allocations;
  chain.think(cache, view, passes, hidden.data(), thoughts.data());
  report("think", before);
  print("think", name, hidden.data(), hidden.size());
  print("thoughts", name, thoughts.data(), thoughts.size());

  struct Way {
    const char* name;
    float temperature, top_p;
    int top_k;
  };
  const std::vector<float> state = hidden;
  for (const Way& way : {Way{"greedy", 0, 1, 0}, Way{"sampled", 1, 1, 0}, Way{"nucleus", 0.8f, 0.7f, 20}}) {
    constexpr int kSteps = 6;
    const int32_t pending[kRows] = {-1, 3, -1, 4, -1}, limits[kRows] = {6, 5, 4, 6, 1}, stops[1] = {2};
    const int32_t writes[kRows] = {5, 5, 3, 6, 0}, first_steps[kRows] = {0, 1, 2, 3, 4};
    const uint64_t seeds[kRows] = {1, 2, 3, 4, 5};
    int32_t tokens[kRows * kSteps], produced[kRows];
    std::fill(tokens, tokens + kRows * kSteps, -1);
    int64_t kept[kRows];
    for (int i = 0; i < kRows; ++i) kept[i] = layout.lengths()[rows64[i]];
    view = extend(writes);
    hidden = state;
    before = allocations;
    chain.decode(cache, view,
                 {kSteps, pending, limits, stops, 1, way.temperature, way.top_p, way.top_k, seeds, first_steps, tokens,
                  produced},
                 hidden.data());
    report(way.name, before);
    std::printf("%s tokens-%s", name.c_str(), way.name);
    for (int32_t token : tokens) std::printf(" %d", token);
    std::printf("\n");
    layout.truncate(rows64, kept, kRows);
  }
}

// Three rows of a training step: attention forward and backward.
void run_attention() {
  constexpr int kTokens = 40, kBatch = 3, kWidth = kHeads * kHeadDim, kPage = 16;
  Numbers numbers{11};
  const auto query = numbers.many(kTokens * kWidth, 1), keys = numbers.many(6 * kPage * kWidth, 1),
             values = numbers.many(6 * kPage * kWidth, 1), grad_out = numbers.many(kTokens * kWidth, 1);
  const int32_t table[kBatch * 2] = {0, 3, 1, 4, 2, 5}, rows[kBatch] = {2, 0, 1}, offsets[kBatch + 1] = {0, 30, 31, 40},
                lengths[kBatch] = {30, 20, 9};
  const Attention attention{query.data(), keys.data(), values.data(), table, rows, offsets, lengths, Dtype::f32,
                            Dtype::f32, kBatch, kHeads, kHeads, kHeadDim, kHeadDim, 2, kPage, 0,
                            1 / std::sqrt(double(kHeadDim)), 0, 0, 0};
  const Parallel alone{1, [](int64_t, const std::function<void()>& work) { work(); }};
  std::vector<float> out(kTokens * kWidth), lse(kTokens * kHeads), grad_query(out.size()), grad_keys(keys.size()),
      grad_values(keys.size());
  attention_forward(attention, out.data(), lse.data(), alone);
  attention_backward(attention, {grad_out.data(), out.data(), lse.data(), grad_query.data(), grad_keys.data(),
                                 grad_values.data()}, alone);
  print("out", "attention", out.data(), out.size());
  print("grad-query", "attention", grad_query.data(), grad_query.size());
  print("grad-keys", "attention", grad_keys.data(), grad_keys.size());
  print("grad-values", "attention", grad_values.data(), grad_values.size());
}

}  // namespace
}  // namespace coconut_fast

int main() {
  using namespace coconut_fast;
  std::printf("isa %s\n", isa_name(best_isa()));
  const std::pair<const char*, Format> formats[] = {
      {"fp32", Format::fp32}, {"bf16", Format::bf16}, {"int8", Format::int8}};
  for (const auto& [name, format] : formats)
    for (bool llama : {false, true}) run_chain(std::string(llama ? "llama-" : "gpt2-") + name, llama, format, 2);
  run_attention();
}
