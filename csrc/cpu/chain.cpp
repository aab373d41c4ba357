#include "cpu/chain.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/attention.h"

namespace coconut_fast {

namespace {

// `bytes` rounded up to an odd number of cache lines, so that rows start on different cache sets.
size_t odd_lines(size_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

}  // namespace

Chain::Chain(const ChainShape& shape, Format format, int threads, int max_tokens, Isa isa)
    : shape_(shape), format_(format), max_tokens_(max_tokens), kernels_(kernels_for(isa)),
      layers_(shape.layers), tokens_(max_tokens), active_(max_tokens), states_(max_tokens), draws_(max_tokens),
      chosen_(max_tokens) {
  spare_.stride = odd_lines(shape.dim * sizeof(float)) / sizeof(float);
  attended_ = make_rows(shape.heads * shape.head_dim);
  sums_stride_ = size_t(max_tokens) * 64 + 16;
  scratch_stride_ = attend_scratch(shape.heads, shape.head_dim);
  cos_ = make_memory<float>(size_t(max_tokens) * shape.head_dim / 2);
  sin_ = make_memory<float>(size_t(max_tokens) * shape.head_dim / 2);
  queries_ = make_memory<float>(size_t(max_tokens) * shape.heads * shape.head_dim);
  lse_ = make_memory<float>(size_t(max_tokens) * shape.heads);
  runs_.rows.resize(max_tokens), runs_.lengths.resize(max_tokens), runs_.offsets.resize(max_tokens + 1);
  row_logits_ = make_memory<float>(shape.vocab);
  order_ = make_memory<int>(shape.vocab);
  set_threads(threads);
}

void Chain::set_threads(int threads) {
  const std::lock_guard<std::mutex> lock(turn_);
  // All that may throw comes first: where it does, nothing has changed.
  auto team = std::make_unique<Team>(threads);
  auto spare = make_memory<float>(spare_.stride * threads);
  auto sums = make_memory<float>(sums_stride_ * threads);
  auto scratch = make_memory<float>(scratch_stride_ * threads);
  auto candidates = make_memory<Candidates>(size_t(max_tokens_) * threads);
  std::vector<Span> spans(size_t(threads) * kSpans);
  std::vector<KVPrefetch> kv_prefetches(threads);
  std::vector<WeightPrefetch> weight_prefetches(threads);
  std::vector<Picked> picked(size_t(max_tokens_) * threads);
  team_ = std::move(team);
  spare_.data = std::move(spare), sums_ = std::move(sums), scratch_ = std::move(scratch);
  candidates_ = std::move(candidates), spans_ = std::move(spans), picked_ = std::move(picked);
  kv_prefetches_ = std::move(kv_prefetches), weight_prefetches_ = std::move(weight_prefetches);
  threads_ = threads;
}

Chain::Rows Chain::make_rows(int width) const {
  Rows rows;
  rows.stride = odd_lines(size_t(width + 63) / 64 * 64 * sizeof(float)) / sizeof(float);
  rows.data = make_memory<float>(rows.stride * max_tokens_);
  return rows;
}

// `width`: values that may be written to a row, if more than the layer reads.
Chain::Inputs Chain::make_inputs(const Linear& linear, int width) const {
  Inputs inputs;
  inputs.kind = kernels_.input[static_cast<int>(linear.format)];
  const size_t k = std::max(linear.k_padded, width);
  inputs.low = k;  // high digits, then low ones
  inputs.stride = odd_lines(inputs.kind == InputKind::fp32 ? 4 * k : 2 * k);
  inputs.segments = linear.segments();
  inputs.data = make_memory<char>(inputs.stride * max_tokens_);
  inputs.scales = make_memory<float>(inputs.segments * max_tokens_);
  inputs.offsets = make_memory<int32_t>(inputs.segments * max_tokens_);
  return inputs;
}

const float* Chain::keep(const float* values, int n) {
  if (!values) return nullptr;
  float* copy = reinterpret_cast<float*>(arena_.take(n * sizeof(float)));
  std::copy(values, values + n, copy);
  return copy;
}

Linear Chain::pack_matrix(const Matrix& w, const float* bias, int n, int k, bool paired) {
  return pack(w, bias, n, k, format_, paired, kernels_.isa, arena_, *team_);
}

void Chain::set_layer(int index, const LayerWeights& w) {
  const std::lock_guard<std::mutex> turn(turn_);
  const ChainShape& s = shape_;
  const int q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
  Layer& layer = layers_.at(index);
  layer.qkv = pack_matrix(w.qkv, w.qkv_bias, q + 2 * kv, s.dim, false);
  layer.o = pack_matrix(w.o, w.o_bias, s.dim, q, false);
  layer.up = pack_matrix(w.up, w.up_bias, s.gated ? 2 * s.inner : s.inner, s.dim, s.gated);
  layer.down = pack_matrix(w.down, w.down_bias, s.dim, s.inner, false);
  layer.norm1 = {keep(w.norm1, s.dim), keep(w.norm1_bias, s.dim), s.layer_norm, s.eps};
  layer.norm2 = {keep(w.norm2, s.dim), keep(w.norm2_bias, s.dim), s.layer_norm, s.eps};
  layer.q_norm = keep(w.q_norm, s.head_dim);
  layer.k_norm = keep(w.k_norm, s.head_dim);
  layer.scaling = w.scaling;
  layer.window = w.window;
  if (index > 0) return;
  // Every output of a padded chunk is written, so rows are as wide as the layers that write them.
  x_ = make_rows(std::max(layer.o.n_padded(), layer.down.n_padded()));
  qkv_ = make_rows(layer.qkv.n_padded());
  const int made = layer.up.n_padded() / (s.gated ? 2 : 1);
  mid_ = make_rows(std::max(made, layer.down.k_padded));
  from_x_ = make_inputs(layer.qkv);
  from_attended_ = make_inputs(layer.o);
  from_mid_ = make_inputs(layer.down, made);
}

void Chain::set_embeddings(const EmbeddingWeights& w) {
  const std::lock_guard<std::mutex> turn(turn_);
  embed_ = w.embed;
  positions_ = w.positions;
  head_ = pack_matrix(w.head, w.head_bias, shape_.vocab, shape_.dim, false);
  final_norm_ = {keep(w.final_norm, shape_.dim), keep(w.final_norm_bias, shape_.dim), shape_.layer_norm, shape_.eps};
  inv_freq_ = keep(w.inv_freq, shape_.head_dim / 2);
  tallies_ = make_memory<Tally>(size_t(head_.chunks) * max_tokens_);
}

void Chain::set_feedback(float norm, const float* constant) {
  const std::lock_guard<std::mutex> turn(turn_);
  rescale_ = norm;
  constant_ = keep(constant, shape_.dim);
}

bool Chain::ready() const {
  const auto set = [](const Layer& layer) { return layer.norm2.weight != nullptr; };
  return final_norm_.weight && std::all_of(layers_.begin(), layers_.end(), set);
}

namespace {

size_t bytes_of(const Linear& linear) { return linear.bytes_per_chunk() * linear.chunks; }

}  // namespace

size_t Chain::body_bytes() const {
  size_t bytes = 0;
  for (const Layer& layer : layers_)
    bytes += bytes_of(layer.qkv) + bytes_of(layer.o) + bytes_of(layer.up) + bytes_of(layer.down);
  return bytes;
}

size_t Chain::head_bytes() const { return bytes_of(head_); }

// ---- calls --------------------------------------------------------------------------------------------------------

// Throws if a call has more rows than one pass can hold.
static void check_rows(const RowsView& rows, int most) {
  if (rows.count > most)
    throw std::invalid_argument("rows: at most " + std::to_string(most) + " in one call, found " +
                                std::to_string(rows.count));
}

template <class Position>
int Chain::gather(int t, const RowsView& rows, Position position) {
  team_->barrier();  // all threads are done with the previous list
  if (t == 0) {
    gathered_ = 0;
    for (int i = 0; i < rows.count; ++i) {
      const int32_t at = position(i);
      if (at < 0) continue;
      active_[gathered_] = i;
      tokens_[gathered_++] = {rows.rows[i], at};
    }
  }
  team_->barrier();
  return gathered_;
}

// All threads step through the rows alike, each with an `at` of its own; thread 0 writes the lists.
int Chain::gather_runs(int t, const RowsView& rows, const int32_t* counts, Progress& at) {
  int count = 0;
  if (t == 0) runs_.count = runs_.finished = 0;
  while (at.row < rows.count && count < max_tokens_) {
    const int n = std::min(counts[at.row] - at.done, max_tokens_ - count);
    if (t == 0 && n > 0) {
      const int32_t row = rows.rows[at.row], start = rows.starts[at.row] + at.done;
      for (int i = 0; i < n; ++i) {
        tokens_[count + i] = {row, start + i};
        active_[count + i] = at.row;
      }
      runs_.rows[runs_.count] = row;
      runs_.lengths[runs_.count] = start + n;
      runs_.offsets[runs_.count++] = count;
      runs_.offsets[runs_.count] = count + n;
    }
    count += n, at.done += n;
    if (at.done < counts[at.row]) break;
    if (t == 0) runs_.finished = runs_.count;
    ++at.row, at.done = 0;
  }
  team_->barrier();
  return count;
}

void Chain::prefill(const CacheView& cache, const RowsView& rows, const int32_t* ids, const int32_t* counts,
                    float* hidden) {
  const std::lock_guard<std::mutex> turn(turn_);
  std::atomic<bool> short_of_memory{false};
  team_->run([&](int t) {
    // An exception must not leave a thread of the team.
    if (!reserve_prompt(shape_.head_dim)) short_of_memory = true;
    team_->barrier();
    if (short_of_memory) return;
    Progress at;
    const int32_t* next = ids;
    while (true) {
      const int count = gather_runs(t, rows, counts, at);
      if (count == 0) return;
      for (int m = t; m < count; m += team_->size()) {
        if (next[m] < 0) embed_state(m, hidden + size_t(active_[m]) * shape_.dim);
        else embed_id(m, next[m]);
      }
      start_tokens(t, count);
      next += count;
      body(t, count, cache, layers_[0].qkv, true);
      finish_states(t, runs_.finished, hidden);
    }
  });
  if (short_of_memory) throw std::bad_alloc();
}

void Chain::think(const CacheView& cache, const RowsView& rows, const int32_t* counts, float* hidden, float* thoughts) {
  check_rows(rows, max_tokens_);
  const std::lock_guard<std::mutex> turn(turn_);
  team_->run([&](int t) {
    for (int step = 0;; ++step) {
      const int count = gather(t, rows, [&](int i) { return step < counts[i] ? rows.starts[i] + step : -1; });
      if (count == 0) return;
      for (int m = t; m < count; m += team_->size()) {
        const float* state = hidden + size_t(active_[m]) * shape_.dim;
        embed_state(m, state);
        if (thoughts) {
          size_t at = step;
          for (int i = 0; i < active_[m]; ++i) at += counts[i];
          std::copy(state, state + shape_.dim, thoughts + at * shape_.dim);
        }
      }
      start_tokens(t, count);
      body(t, count, cache, layers_[0].qkv);
      finish_states(t, count, hidden);
    }
  });
}

void Chain::decode(const CacheView& cache, const RowsView& rows, const DecodeRequest& request, float* hidden) {
  check_rows(rows, max_tokens_);
  const std::lock_guard<std::mutex> turn(turn_);
  for (int i = 0; i < rows.count; ++i) {
    states_[i] = {request.pending[i], rows.starts[i], request.limits[i] > 0 && request.steps > 0};
    request.produced[i] = 0;
  }
  team_->run([&](int t) {
    while (true) {
      int count = gather(t, rows, [&](int i) {
        return states_[i].running && states_[i].pending >= 0 ? states_[i].position : -1;
      });
      if (count > 0) {
        for (int m = t; m < count; m += team_->size()) embed_id(m, states_[active_[m]].pending);
        start_tokens(t, count);
        body(t, count, cache, head_);
        finish_states(t, count, hidden);
      }
      count = gather(t, rows, [&](int i) { return states_[i].running ? 0 : -1; });
      if (count == 0) return;
      pick_tokens(t, count, request, hidden);
      if (t == 0) accept(count, request);
      team_->barrier();
    }
  });
}

void Chain::accept(int count, const DecodeRequest& request) {
  for (int m = 0; m < count; ++m) {
    const int i = active_[m];
    RowState& state = states_[i];
    state.position += state.pending >= 0;
    state.pending = chosen_[m];
    const int made = request.produced[i]++;
    request.tokens[size_t(i) * request.steps + made] = chosen_[m];
    const bool stop = std::find(request.stops, request.stops + request.stop_count, chosen_[m]) !=
                      request.stops + request.stop_count;
    state.running = !stop && made + 1 < std::min(request.limits[i], request.steps);
  }
}

}  // namespace coconut_fast
