// The native chain: runs a model of a known family from packed weights, k thoughts or n tokens for many rows per call.
//
// No allocation and no Python inside a call: one team of threads walks through the phases of every layer together, a
// barrier after each. Calls from several threads take turns, since they share the team and its buffers. Keys and values
// go to the paged cache, which the caller owns; rows may differ in length and in the number of thoughts or tokens. The
// residual stream, norms, attention and all sums are fp32.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/sampling.h"

namespace coconut_fast {

struct ChainShape {
  int layers, dim, heads, kv_heads, head_dim, inner, vocab, max_positions;
  bool layer_norm;  // else RMSNorm
  float eps;
  Activation activation;
  bool gated;
  float rope_scaling;
};

struct LayerWeights {
  Matrix qkv, o, up, down;
  // Vectors are fp32 and copied; null where the model has none.
  const float *qkv_bias, *o_bias, *up_bias, *down_bias;
  const float *norm1, *norm1_bias, *norm2, *norm2_bias, *q_norm, *k_norm;
  float scaling;
  int window;
};

struct EmbeddingWeights {
  Matrix embed, positions;  // read in place: they must outlive the chain; positions.data null for rotary embedding
  Matrix head;
  const float *head_bias, *final_norm, *final_norm_bias, *inv_freq;
};

// The cache of one call: storage per layer, and the table of CacheLayout.
struct CacheView {
  std::vector<void*> keys, values;
  Dtype dtype;
  const int32_t* page_table;
  int64_t pages_per_row, page_size;
};

// Arrays over the rows of a call: which cache row, and how many tokens it had before. The positions that the call
// writes must already be in the page table.
struct RowsView {
  int count;
  const int32_t *rows, *starts;
};

struct DecodeRequest {
  int steps;               // at most this many tokens per row
  const int32_t* pending;  // per row: a token sampled earlier and not in the cache yet, or -1: start from `hidden`
  const int32_t* limits;   // per row: its own limit
  const int32_t* stops;    // a row ends after one of these
  int stop_count;
  float temperature, top_p;
  int top_k;
  const uint64_t* seeds;        // per row
  const int32_t* first_steps;   // per row: number of tokens drawn before (the noise depends on it)
  int32_t* tokens;              // out: [row][steps]
  int32_t* produced;            // out: per row
};

class Chain {
 public:
  // max_tokens: rows (or prompt tokens) of one pass.
  Chain(const ChainShape& shape, Format format, int threads, int max_tokens, Isa isa);

  // With how many threads later calls run. std::runtime_error where the system does not start so many, std::bad_alloc
  // where it lacks the memory; then nothing has changed.
  void set_threads(int threads);
  void set_layer(int layer, const LayerWeights& weights);
  void set_embeddings(const EmbeddingWeights& weights);
  // How a hidden state is fed back: scaled to this norm (0: unchanged), or replaced by a constant vector (null: not
  // replaced).
  void set_feedback(float norm, const float* constant);
  bool ready() const;  // whether all layers and the embeddings are set, as the calls below require

  // Prefills each row's prompt tokens, concatenated in `ids`; hidden (rows, dim) receives the state after each row's
  // last token. An id of -1 stands for a thought: the row's state in hidden is fed back there. std::bad_alloc where
  // there is no memory for attention; then nothing has changed.
  void prefill(const CacheView& cache, const RowsView& rows, const int32_t* ids, const int32_t* counts, float* hidden);

  // Runs counts[i] latent passes for row i: hidden is fed back, and becomes the state after the last pass. `thoughts`,
  // if not null, receives the states that were fed back: (sum of counts, dim), row after row.
  void think(const CacheView& cache, const RowsView& rows, const int32_t* counts, float* hidden, float* thoughts);

  // hidden is read where a row has no pending token. The last token produced is not written to the cache.
  void decode(const CacheView& cache, const RowsView& rows, const DecodeRequest& request, float* hidden);

  const ChainShape& shape() const { return shape_; }
  int threads() const { return threads_; }
  Isa isa() const { return kernels_.isa; }
  size_t body_bytes() const;  // read by a latent pass
  size_t head_bytes() const;  // read in addition for a token

 private:
  struct Layer {
    Linear qkv, o, up, down;
    Norm norm1, norm2;
    const float *q_norm, *k_norm;
    float scaling;
    int window;
  };
  // fp32 rows with zeros after `width`, and the input of a linear layer made from them.
  struct Rows {
    Memory<float> data;
    size_t stride = 0;  // floats
    float* row(int m) const { return data.get() + m * stride; }
  };
  struct Inputs {
    InputKind kind = InputKind::fp32;
    Memory<char> data;
    Memory<float> scales;
    Memory<int32_t> offsets;
    size_t stride = 0, low = 0, segments = 0;
    Input view() const { return {data.get(), stride, low, scales.get(), offsets.get(), segments}; }
    InputRow row(int m) const {
      return {kind, data.get() + m * stride, low, scales.get() + m * segments, offsets.get() + m * segments};
    }
  };
  struct Token {
    int32_t row, position;
  };

  // One prefill pass grouped by row: `count` groups, of which the first `finished` reach the end of their prompt.
  struct Runs {
    int count = 0, finished = 0;
    std::vector<int32_t> rows, offsets, lengths;
  };

  // How far a prefill call is: its next token is number `done` of row `row`.
  struct Progress {
    int row = 0, done = 0;
  };

  // A row of a decode call.
  struct RowState {
    int32_t pending, position;
    bool running;
  };

  Rows make_rows(int width) const;
  Inputs make_inputs(const Linear& linear, int width = 0) const;
  const float* keep(const float* values, int n);
  Linear pack_matrix(const Matrix& w, const float* bias, int n, int k, bool paired);

  // Phases: every thread of the team calls them, does its part and waits.
  // Lists the rows i with position(i) >= 0 in active_ and tokens_, and returns how many there are.
  template <class Position>
  int gather(int t, const RowsView& rows, Position position);
  // Lists the tokens of a prefill's next pass in active_, tokens_ and runs_, and returns how many there are.
  int gather_runs(int t, const RowsView& rows, const int32_t* counts, Progress& at);
  // All layers. `after`: the weights used next, whose first bytes are prefetched at the end.
  void body(int t, int tokens, const CacheView& cache, const Linear& after, bool prompt = false);
  void plan_kv_prefetch(int t, int tokens, const CacheView& cache, int layer);
  void finish_attended(int m, int first, int count);
  void attend_tokens(int t, int tokens, const DecodeAttention& attend);
  void write_runs(int t, int tokens, const DecodeAttention& attend);
  int keep_ends(int t);
  void attend_runs(int t, const DecodeAttention& attend);
  void normalise(int t, int tokens, const Norm& norm, const Inputs& to);
  Input inputs_of(int t, int tokens, const Rows& rows, const Linear& linear, const Inputs& to);
  template <class Finish>
  void multiply(int t, const Linear& linear, const Input& input, int tokens, const Linear& next, Finish finish);
  void start_tokens(int t, int tokens);
  void embed_id(int m, int32_t id);
  void embed_state(int m, const float* hidden);
  void finish_states(int t, int tokens, float* hidden);
  void pick_tokens(int t, int count, const DecodeRequest& request, const float* hidden);
  int ids_of(int c) const;
  int used_chunks() const { return (shape_.vocab + head_.width() - 1) / head_.width(); }
  int best_of_threads(int m) const;
  Input head_input(int m) const;
  int draw_candidate(int m, const Draw& draw);
  int draw_any(int t, int m, const Draw& draw);
  void pick_exactly(int t, int m);
  void accept(int count, const DecodeRequest& request);
  const char* start_of(const Linear& linear, int t) const;
  void start_stream(int t, const Linear& linear, const Linear& next);
  void wait(int t) { team_->barrier(weight_prefetches_[t].at, weight_prefetches_[t].limit); }

  const ChainShape shape_;
  const Format format_;
  const int max_tokens_;
  const Kernels& kernels_;
  std::mutex turn_;  // held for a whole call, by callers that do not hold the GIL
  std::unique_ptr<Team> team_;
  std::atomic<int> threads_;  // of the team, for callers that do not wait for their turn
  Arena arena_;
  std::vector<Layer> layers_;
  Linear head_;
  Norm final_norm_;
  Matrix embed_, positions_;
  const float* inv_freq_ = nullptr;
  float rescale_ = 0;
  const float* constant_ = nullptr;

  Rows x_, qkv_, attended_, mid_, spare_;  // spare_: one row per thread
  Inputs from_x_, from_attended_, from_mid_;
  Memory<float> sums_, scratch_, cos_, sin_;  // per thread; per token
  size_t sums_stride_ = 0, scratch_stride_ = 0;
  Memory<float> queries_, lse_;  // of prefill: (tokens, heads, head_dim), (tokens, heads)
  Runs runs_;
  static constexpr int kSpans = 256;
  static constexpr size_t kLead = 12 << 10;  // bytes of weights prefetched ahead for one or two rows
  std::vector<Span> spans_;                        // [thread][kSpans]: of kv_prefetches_
  std::vector<KVPrefetch> kv_prefetches_;          // of the next attention, per thread
  std::vector<WeightPrefetch> weight_prefetches_;  // per thread
  std::vector<Token> tokens_;
  int gathered_ = 0;
  std::vector<int> active_;  // per token of the pass: index of its row in the call
  std::vector<RowState> states_;
  std::vector<Draw> draws_;
  std::vector<Picked> picked_;         // [thread][row]
  Memory<Candidates> candidates_;      // [thread][row]
  Memory<Tally> tallies_;              // [row][chunk of the head]
  Memory<float> row_logits_;           // (vocab,)
  Memory<int> order_;                  // (vocab,)
  std::vector<int> chosen_;
};

}  // namespace coconut_fast
