#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace coconut_fast {

namespace {

double relative(float logit, float largest) { return std::exp(static_cast<double>(logit) - largest); }

// Sorts pairs (logit, id) in place, by heapsort: the heap's top is the last in order.
template <typename Before>
void sort_pairs(float* logits, int* ids, int n, Before before) {
  const auto sink = [&](int root, int size) {
    for (int child; (child = 2 * root + 1) < size; root = child) {
      if (child + 1 < size && before(child, child + 1)) ++child;
      if (!before(root, child)) return;
      std::swap(logits[root], logits[child]);
      std::swap(ids[root], ids[child]);
    }
  };
  for (int i = n / 2 - 1; i >= 0; --i) sink(i, n);
  for (int size = n - 1; size > 0; --size) {
    std::swap(logits[0], logits[size]);
    std::swap(ids[0], ids[size]);
    sink(0, size);
  }
}

void sort_by_logit(float* logits, int* ids, int n) {
  sort_pairs(logits, ids, n, [=](int a, int b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && ids[a] < ids[b]);
  });
}

// How many of n sorted logits top_p keeps, out of total.sum; n + 1 if they do not reach it.
int reach(const float* logits, int n, const Total& total, float top_p) {
  if (top_p >= 1) return n;
  double reached = 0;
  for (int i = 0; i < n; ++i) {
    reached += relative(logits[i], total.largest);
    if (reached >= static_cast<double>(top_p) * total.sum) return i + 1;
  }
  return n + 1;
}

// Draws one of n kept ids, after sorting them by id.
int draw_kept(double uniform, float* logits, int* ids, int n) {
  const float largest = logits[0];
  sort_pairs(logits, ids, n, [=](int a, int b) { return ids[a] < ids[b]; });
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += relative(logits[i], largest);
  return ids[place_within(logits, n, largest, uniform * sum)];
}

}  // namespace

double uniform(uint64_t seed, uint64_t step) {
  uint64_t z = seed + (step + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

Total total_of(const Tally* tallies, int count) {
  Total total{-std::numeric_limits<float>::infinity(), 0};
  for (int c = 0; c < count; ++c) total.largest = std::max(total.largest, tallies[c].largest);
  for (int c = 0; c < count; ++c) total.sum += tallies[c].sum * relative(tallies[c].largest, total.largest);
  return total;
}

Place place(const Tally* tallies, int count, const Total& total, double draw) {
  const double wanted = draw * total.sum;
  double before = 0;
  for (int c = 0;; ++c) {
    const double here = tallies[c].sum * relative(tallies[c].largest, total.largest);
    if (before + here > wanted || c + 1 == count) return {c, wanted - before};
    before += here;
  }
}

int place_within(const float* logits, int count, float largest, double left) {
  double reached = 0;
  for (int i = 0; i < count; ++i) {
    reached += relative(logits[i], largest);
    if (reached > left) return i;
  }
  return count - 1;
}

void begin(Candidates& candidates) {
  candidates.count = 0;
  candidates.least = -std::numeric_limits<float>::infinity();
}

void shrink(Candidates& candidates) {
  sort_by_logit(candidates.logits, candidates.ids, candidates.count);
  candidates.count = std::min(candidates.count, Candidates::kKeep);
  // Ids come in rising order: one that ties with the least of those kept loses to it.
  candidates.least = candidates.logits[candidates.count - 1];
}

void merge(Candidates& candidates, const Candidates& other) {
  for (int i = 0; i < other.count; ++i) {
    candidates.logits[candidates.count] = other.logits[i];
    candidates.ids[candidates.count++] = other.ids[i];
    if (candidates.count == 2 * Candidates::kKeep) shrink(candidates);
  }
}

int choose(const Draw& draw, Candidates& c, const Total& total, int all) {
  sort_by_logit(c.logits, c.ids, c.count);
  const int sure = c.count < all ? std::min(c.count, Candidates::kKeep) : all;  // beyond these, some may be missing
  const bool limited = draw.top_k > 0 && draw.top_k < all;
  if (limited && draw.top_k > sure) return -1;
  const int most = limited ? draw.top_k : sure;
  Total of = total;
  if (limited) {
    of.sum = 0;
    for (int i = 0; i < most; ++i) of.sum += relative(c.logits[i], of.largest);
  }
  int kept = reach(c.logits, most, of, draw.top_p);
  if (kept > most) {
    if (!limited && most < all) return -1;
    kept = most;  // short of top_p by rounding only
  }
  return draw_kept(draw.uniform, c.logits, c.ids, kept);
}

int choose_exactly(const Draw& draw, float* logits, int* order, int n) {
  std::iota(order, order + n, 0);
  sort_by_logit(logits, order, n);
  const int most = draw.top_k > 0 ? std::min(draw.top_k, n) : n;
  Total total{logits[0], 0};
  for (int i = 0; i < most; ++i) total.sum += relative(logits[i], total.largest);
  return draw_kept(draw.uniform, logits, order, std::min(most, reach(logits, most, total, draw.top_p)));
}

}  // namespace coconut_fast
