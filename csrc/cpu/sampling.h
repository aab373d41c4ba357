// Chooses a token while the logits are computed, without storing them (but see Chain::pick_exactly).
//
// infer/sampling.py has the definition: softmax of logits / temperature; the top_k likeliest ids are kept (ties to the
// lowest id), of these the fewest likeliest that together reach top_p; the token is the first id, in order of ids, at
// which the kept probabilities add up to more than uniform(seed, step) times their sum.
//
// The head writes a Tally per chunk of ids. A draw from all ids finds its chunk from the tallies and recomputes it; a
// draw from kept ids works on Candidates, the largest logits, which nearly always contain all that are kept.
#pragma once

#include <cstdint>

namespace coconut_fast {

// A number in [0, 1): splitmix64.
double uniform(uint64_t seed, uint64_t step);

struct Draw {
  float temperature = 0;  // 0: the largest logit
  int top_k = 0;          // 0: all
  float top_p = 1;
  double uniform = 0;
};

// The best so far of a greedy choice.
struct Picked {
  float value;
  int id;
};

// The largest logit of a chunk (divided by the temperature), and the chunk's sum of exp(logit - largest).
struct Tally {
  float largest, sum;
};

// The same for many chunks; `sum` is relative to the largest of all.
struct Total {
  float largest;
  double sum;
};
Total total_of(const Tally* tallies, int count);

// The chunk in which the running sum passes draw * total, and how much of that is left for the chunk itself.
struct Place {
  int chunk;
  double left;
};
Place place(const Tally* tallies, int count, const Total& total, double draw);

// The index in a chunk's logits at which the running sum of exp(logit - largest) passes `left`.
int place_within(const float* logits, int count, float largest, double left);

// The largest logits (divided by the temperature) of the ids seen so far, which come in rising order.
struct Candidates {
  static constexpr int kKeep = 1024;
  int count;
  float least;  // of those kept: only larger ones need to be stored
  float logits[2 * kKeep];
  int ids[2 * kKeep];
};

void begin(Candidates& candidates);

// Keeps the kKeep largest (ties to the lowest id).
void shrink(Candidates& candidates);

// Adds those of `other`, whose ids are all higher.
void merge(Candidates& candidates, const Candidates& other);

// The token for a draw that top_k or top_p limits; -1 if they may keep more than the candidates. `all` is the number of
// ids in total.
int choose(const Draw& draw, Candidates& candidates, const Total& total, int all);

// The same from all n logits of a row; `order` has room for n ids.
int choose_exactly(const Draw& draw, float* logits, int* order, int n);

}  // namespace coconut_fast
