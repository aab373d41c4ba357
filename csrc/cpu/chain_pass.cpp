// One pass of the chain through all layers, and the choice of tokens after it: phases, each shared by the team.
#include <algorithm>
#include <cmath>

#include "cpu/attention.h"
#include "cpu/chain.h"

namespace coconut_fast {

const char* Chain::start_of(const Linear& linear, int t) const {
  return linear.chunk(share(linear.chunks, t, team_->size()).first);
}

// With one or two rows, weights are prefetched kLead bytes ahead, up to twice that after a wait. L1 has 32 or 48 KiB;
// a whole unit of fp32 weights ahead, 64 KiB, cost 6% of a pass.
void Chain::start_stream(int t, const Linear& linear, const Linear& next) {
  const auto [first, last] = share(linear.chunks, t, team_->size());
  WeightPrefetch& prefetch = weight_prefetches_[t];
  const char* start = linear.chunk(first) + kLead;
  prefetch.end = linear.chunk(last);
  if (prefetch.at < start || prefetch.at >= prefetch.end) prefetch.at = start;
  prefetch.next = start_of(next, t);
  prefetch.limit = prefetch.next + 2 * kLead;
}

// Calls finish(chunk, sums) for every chunk of linear(input) without bias. Prefetches the start of `next` at the end.
template <class Finish>
void Chain::multiply(int t, const Linear& linear, const Input& input, int tokens, const Linear& next, Finish finish) {
  const auto [first, last] = share(linear.chunks, t, team_->size());
  const LinearKernel kernel = kernels_.linear[static_cast<int>(linear.format)];
  float* sums = sums_.get() + t * sums_stride_;
  WeightPrefetch& prefetch = weight_prefetches_[t];
  start_stream(t, linear, next);
  for (int c = first; c < last; ++c) {
    kernel(linear, c, input, tokens, sums, linear.width(), prefetch, kv_prefetches_[t]);
    finish(c, sums);
  }
  // A share may be smaller than the lead.
  if (prefetch.at < prefetch.next || prefetch.at > prefetch.limit) prefetch.at = prefetch.next;
  wait(t);
}

void Chain::normalise(int t, int tokens, const Norm& norm, const Inputs& to) {
  for (int m = t; m < tokens; m += team_->size()) {
    float* normed = spare_.row(t);
    kernels_.norm(norm, x_.row(m), shape_.dim, normed);
    kernels_.prepare(normed, shape_.dim, to.row(m));
  }
  wait(t);
}

// fp32 kernels read the rows in place; bf16 ones read values that were rounded when they were computed; for int8 ones
// rows are converted here, since that takes whole segments.
Input Chain::inputs_of(int t, int tokens, const Rows& rows, const Linear& linear, const Inputs& to) {
  if (to.kind == InputKind::fp32)
    return {reinterpret_cast<const char*>(rows.data.get()), rows.stride * sizeof(float), 0, nullptr, nullptr, 0};
  if (to.kind == InputKind::bf16) return to.view();
  for (int m = t; m < tokens; m += team_->size()) kernels_.prepare(rows.row(m), linear.k, to.row(m));
  team_->barrier();
  return to.view();
}

// Rounds `count` finished values of row m of attended_ while they are in this core's cache.
void Chain::finish_attended(int m, int first, int count) {
  if (from_attended_.kind != InputKind::bf16) return;
  InputRow to = from_attended_.row(m);
  to.data += first * sizeof(uint16_t);
  kernels_.prepare(attended_.row(m) + first, count, to);
}

// Thoughts and tokens: one position per row, head by head through its keys and values. A head of a row is read by the
// thread that wrote it, so no barrier is needed in between.
void Chain::attend_tokens(int t, int tokens, const DecodeAttention& attend) {
  const int heads = shape_.kv_heads;
  const auto [first, last] = share(tokens * heads, t, team_->size());
  for (int i = first; i < last; ++i) {
    const Token& token = tokens_[i / heads];
    kernels_.write(attend, i / heads, i % heads, token.row, token.position);
  }
  for (int i = first, m, end; i < last; i = end) {
    m = i / heads;
    end = std::min(last, (m + 1) * heads);
    kernels_.attend(attend, m, i % heads, end - m * heads, tokens_[m].row, tokens_[m].position);
    const int values = attend.heads / heads * attend.head_dim;  // of the queries that share a kv head
    finish_attended(m, i % heads * values, (end - i) * values);
  }
  wait(t);
}

// Lists what attend_tokens() will read in this layer on this thread, for the products before it to prefetch: up to
// kSpans spans; the rest it fetches itself.
void Chain::plan_kv_prefetch(int t, int tokens, const CacheView& cache, int layer) {
  KVPrefetch& kv = kv_prefetches_[t];
  kv = {};
  if (layer >= shape_.layers) return;
  const int heads = shape_.kv_heads, window = layers_[layer].window;
  const auto [first, last] = share(tokens * heads, t, team_->size());
  const int64_t slot = int64_t(heads) * shape_.head_dim * size_of(cache.dtype);
  Span *const begin = spans_.data() + size_t(t) * kSpans, *const end = begin + kSpans, *span = begin;
  for (int m = first / heads; m * heads < last && span < end; ++m) {
    const auto [row, position] = tokens_[m];
    const int32_t* pages = cache.page_table + row * cache.pages_per_row;
    int64_t p = window && position >= window ? position - window + 1 : 0;
    while (p <= position && span < end) {
      const int64_t within = p % cache.page_size, here = std::min(cache.page_size - within, position + 1 - p);
      const size_t offset = (pages[p / cache.page_size] * cache.page_size + within) * slot;
      if (span > begin && span[-1].offset + span[-1].bytes == offset) span[-1].bytes += here * slot;
      else *span++ = {offset, size_t(here * slot)};
      p += here;
    }
  }
  kv.span = begin, kv.last = span;
  kv.keys = static_cast<const char*>(cache.keys[layer]);
  kv.values = static_cast<const char*>(cache.values[layer]);
}

void Chain::write_runs(int t, int tokens, const DecodeAttention& a) {
  for (int m = t; m < tokens; m += team_->size()) {
    float* queries = queries_.get() + size_t(m) * a.heads * a.head_dim;
    for (int h = 0; h < a.kv_heads; ++h) kernels_.write(a, m, h, tokens_[m].row, tokens_[m].position);
    for (int h = 0; h < a.heads; ++h) kernels_.query(a, m, h, queries + size_t(h) * a.head_dim);
  }
  team_->barrier();
}

// After the last layer's keys and values only the last tokens of finished prompts continue, since no other state is
// used; they become the first tokens of the pass.
int Chain::keep_ends(int t) {
  const size_t width = size_t(shape_.heads) * shape_.head_dim;
  if (t == 0) {
    for (int j = 0; j < runs_.finished; ++j) {
      const int m = runs_.offsets[j + 1] - 1;
      std::copy_n(x_.row(m), shape_.dim, x_.row(j));
      std::copy_n(queries_.get() + m * width, width, queries_.get() + j * width);
      active_[j] = active_[m];
      runs_.offsets[j] = j;
    }
    runs_.count = runs_.offsets[runs_.finished] = runs_.finished;
  }
  team_->barrier();
  return runs_.count;
}

// All tokens of a row in this pass together. Prefill always comes here, thoughts and decoded tokens always go to
// attend_tokens(), whatever the batch: results must not depend on it.
void Chain::attend_runs(int t, const DecodeAttention& a) {
  const int n = a.head_dim, shared = a.heads / a.kv_heads, size = team_->size();
  const auto query_of = [&](int m, int head) { return queries_.get() + (size_t(m) * a.heads + head) * n; };
  const Attention attention{queries_.get(), a.keys, a.values, a.page_table, runs_.rows.data(), runs_.offsets.data(),
                            runs_.lengths.data(), Dtype::f32, a.dtype, runs_.count, a.heads, a.kv_heads, n, n,
                            a.pages_per_row, a.page_size, a.window, a.scaling, 0, 0, 0};
  for (int i = t; i < runs_.count * a.kv_heads; i += size) {
    const int run = i / a.kv_heads, head = i % a.kv_heads;
    attend_prompt(attention, kernels_.isa, run, head, queries_.get(), lse_.get());
    for (int m = runs_.offsets[run]; m < runs_.offsets[run + 1]; ++m) {
      std::copy_n(query_of(m, head * shared), shared * n, a.out + m * a.out_stride + size_t(head) * shared * n);
      finish_attended(m, head * shared * n, shared * n);
    }
  }
  team_->barrier();
}

// `prompt`: the tokens are those of runs_.
void Chain::body(int t, int tokens, const CacheView& cache, const Linear& after, bool prompt) {
  const ChainShape& s = shape_;
  const auto store_to = [&](const Linear& linear, const Rows& rows) {
    return [&, out = rows.data.get(), stride = rows.stride](int c, const float* sums) {
      const int width = linear.width(), first = c * width;
      kernels_.finish_store(sums, tokens, width, linear.bias ? linear.bias + first : nullptr, out + first, stride);
    };
  };
  const auto add_to = [&](const Linear& linear, const Rows& rows) {
    return [&, out = rows.data.get(), stride = rows.stride](int c, const float* sums) {
      const int width = linear.width(), first = c * width;
      kernels_.finish_add(sums, tokens, width, linear.bias ? linear.bias + first : nullptr, out + first, stride);
    };
  };
  if (!prompt) plan_kv_prefetch(t, tokens, cache, 0);
  for (int l = 0; l < s.layers; ++l) {
    const Layer& layer = layers_[l];
    normalise(t, tokens, layer.norm1, from_x_);
    multiply(t, layer.qkv, from_x_.view(), tokens, layer.o, store_to(layer.qkv, qkv_));

    const bool rotary = inv_freq_ != nullptr;
    const DecodeAttention attend{qkv_.data.get(), qkv_.stride, attended_.data.get(), attended_.stride,
                        rotary ? cos_.get() : nullptr, rotary ? sin_.get() : nullptr, layer.q_norm, layer.k_norm, s.eps,
                        cache.keys[l], cache.values[l], cache.dtype, cache.page_table, cache.pages_per_row,
                        cache.page_size, s.heads, s.kv_heads, s.head_dim, layer.window, layer.scaling,
                        scratch_.get() + t * scratch_stride_};
    if (prompt) {
      write_runs(t, tokens, attend);
      if (l + 1 == s.layers) tokens = keep_ends(t);
      if (tokens == 0) return;
      attend_runs(t, attend);
    } else {
      attend_tokens(t, tokens, attend);
      plan_kv_prefetch(t, tokens, cache, l + 1);
    }

    multiply(t, layer.o, inputs_of(t, tokens, attended_, layer.o, from_attended_), tokens, layer.up,
             add_to(layer.o, x_));
    normalise(t, tokens, layer.norm2, from_x_);
    multiply(t, layer.up, from_x_.view(), tokens, layer.down, [&](int c, const float* sums) {
      const int width = layer.up.width(), made = s.gated ? width / 2 : width;
      const bool bf16 = from_mid_.kind == InputKind::bf16;
      void* out = mid_.row(0) + c * made;
      if (bf16) out = from_mid_.data.get() + c * made * sizeof(uint16_t);
      kernels_.finish_activate(sums, tokens, width, layer.up.bias ? layer.up.bias + c * width : nullptr, s.activation,
                               s.gated, bf16, out, bf16 ? from_mid_.stride / sizeof(uint16_t) : mid_.stride);
    });
    multiply(t, layer.down, inputs_of(t, tokens, mid_, layer.down, from_mid_), tokens,
             l + 1 < s.layers ? layers_[l + 1].qkv : after, add_to(layer.down, x_));
  }
}

// ---- ends of a pass -----------------------------------------------------------------------------------------------

void Chain::start_tokens(int t, int tokens) {
  const int half = shape_.head_dim / 2;
  for (int m = t; m < tokens; m += team_->size()) {
    const int position = tokens_[m].position;
    float* x = x_.row(m);
    if (positions_.data)
      for (int i = 0; i < shape_.dim; ++i) x[i] += positions_.at(position, i);
    if (inv_freq_)
      kernels_.rotary(position, inv_freq_, half, shape_.rope_scaling, cos_.get() + size_t(m) * half,
                      sin_.get() + size_t(m) * half);
  }
  team_->barrier();
}

void Chain::embed_id(int m, int32_t id) {
  for (int i = 0; i < shape_.dim; ++i) x_.row(m)[i] = embed_.at(id, i);
}

void Chain::embed_state(int m, const float* hidden) {
  float scale = 1;
  if (constant_) hidden = constant_;
  if (rescale_ > 0) {
    double squares = 0;
    for (int i = 0; i < shape_.dim; ++i) squares += static_cast<double>(hidden[i]) * hidden[i];
    scale = squares > 0 ? static_cast<float>(rescale_ / std::sqrt(squares)) : 0;
  }
  for (int i = 0; i < shape_.dim; ++i) x_.row(m)[i] = hidden[i] * scale;
}

void Chain::finish_states(int t, int tokens, float* hidden) {
  for (int m = t; m < tokens; m += team_->size())
    kernels_.norm(final_norm_, x_.row(m), shape_.dim, hidden + size_t(active_[m]) * shape_.dim);
  team_->barrier();
}

// ---- tokens -------------------------------------------------------------------------------------------------------

void Chain::pick_tokens(int t, int count, const DecodeRequest& request, const float* hidden) {
  const int threads = team_->size(), width = head_.width();
  const bool greedy = request.temperature == 0, limited = request.top_k > 0 && request.top_k < shape_.vocab;
  const bool filtered = !greedy && (limited || request.top_p < 1);
  const float inverse = greedy ? 1 : 1 / request.temperature;
  Picked* picked = picked_.data() + size_t(t) * max_tokens_;
  Candidates* candidates = candidates_.get() + size_t(t) * max_tokens_;
  for (int m = 0; m < count; ++m) {
    picked[m] = {-INFINITY, 0};
    if (filtered) begin(candidates[m]);
  }
  for (int m = t; m < count; m += threads)
    kernels_.prepare(hidden + size_t(active_[m]) * shape_.dim, shape_.dim, from_x_.row(m));
  team_->barrier();
  multiply(t, head_, from_x_.view(), count, layers_[0].qkv, [&](int c, float* sums) {
    const int first = c * width, ids = ids_of(c);
    if (head_.bias) kernels_.finish_store(sums, count, width, head_.bias + first, sums, width);
    for (int m = 0; m < count && ids > 0; ++m) {
      float* logits = sums + m * width;
      if (greedy) kernels_.pick(logits, first, ids, picked[m]);
      else kernels_.tally(inverse, logits, ids, tallies_[size_t(m) * head_.chunks + c]);
      if (filtered) kernels_.collect(logits, first, ids, candidates[m]);
    }
  });
  for (int m = t; m < count; m += threads) {
    const int i = active_[m];
    const uint64_t step = uint64_t(request.first_steps[i]) + request.produced[i];
    const Draw draw{request.temperature, request.top_k, request.top_p, uniform(request.seeds[i], step)};
    draws_[m] = draw;
    if (greedy) chosen_[m] = best_of_threads(m);
    else chosen_[m] = filtered ? draw_candidate(m, draw) : draw_any(t, m, draw);
  }
  team_->barrier();
  for (int m = 0; m < count; ++m)
    if (chosen_[m] < 0) pick_exactly(t, m);
}

// How many ids chunk c has: the last ones may be padding.
int Chain::ids_of(int c) const {
  const int left = shape_.vocab - c * head_.width();
  return left < head_.width() ? left : head_.width();
}

int Chain::best_of_threads(int m) const {
  Picked best = picked_[m];
  for (int t = 1; t < team_->size(); ++t) {
    const Picked& other = picked_[size_t(t) * max_tokens_ + m];
    if (other.value > best.value) best = other;  // ids rise from thread to thread: a tie keeps the lower
  }
  return best.id;
}

int Chain::draw_candidate(int m, const Draw& draw) {
  Candidates& all = candidates_[m];
  for (int t = 1; t < team_->size(); ++t) merge(all, candidates_[size_t(t) * max_tokens_ + m]);
  return choose(draw, all, total_of(tallies_.get() + size_t(m) * head_.chunks, used_chunks()), shape_.vocab);
}

Input Chain::head_input(int m) const {
  Input input = from_x_.view();
  input.data += m * input.stride;
  input.scales += m * input.segment_stride;
  input.offsets += m * input.segment_stride;
  return input;
}

// Recomputes the logits of one chunk of ids: the one in which the running sum of probabilities passes the draw.
int Chain::draw_any(int t, int m, const Draw& draw) {
  const Tally* tallies = tallies_.get() + size_t(m) * head_.chunks;
  const Total total = total_of(tallies, used_chunks());
  const Place found = place(tallies, used_chunks(), total, draw.uniform);
  float* logits = sums_.get() + t * sums_stride_;
  const int width = head_.width(), first = found.chunk * width;
  WeightPrefetch prefetch{head_.chunk(found.chunk)};  // nothing to prefetch after it
  kernels_.linear[static_cast<int>(head_.format)](head_, found.chunk, head_input(m), 1, logits, width,
                                                  prefetch, kv_prefetches_[t]);
  if (head_.bias) kernels_.finish_store(logits, 1, width, head_.bias + first, logits, width);
  for (int i = 0; i < ids_of(found.chunk); ++i) logits[i] *= 1 / draw.temperature;
  return first + place_within(logits, ids_of(found.chunk), total.largest, found.left);
}

// For the rare row that keeps more ids than Candidates holds: computes all its logits, then sorts them.
void Chain::pick_exactly(int t, int m) {
  const int width = head_.width();
  const float inverse = 1 / draws_[m].temperature;
  multiply(t, head_, head_input(m), 1, layers_[0].qkv, [&](int c, float* sums) {
    const int first = c * width;
    if (head_.bias) kernels_.finish_store(sums, 1, width, head_.bias + first, sums, width);
    for (int i = 0; i < ids_of(c); ++i) row_logits_[first + i] = sums[i] * inverse;
  });
  if (t == 0) chosen_[m] = choose_exactly(draws_[m], row_logits_.get(), order_.get(), shape_.vocab);
  team_->barrier();
}

}  // namespace coconut_fast
