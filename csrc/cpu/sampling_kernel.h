// Choosing tokens from a chunk of logits, included once per instruction set after vec.h. See sampling.h.

// The largest logit so far; ids come in rising order, so a tie stays with the lower one.
static void pick(const float* logits, int first_id, int count, Picked& picked) {
  for (int i = 0; i < count; i += W) {
    const int n = count - i < W ? count - i : W;
    Vec v = load_part(logits + i, n);
    for (int j = n; j < W; ++j) v[j] = -INFINITY;
    const float top = largest(v);
    if (!(top > picked.value)) continue;
    int j = 0;
    while (v[j] != top) ++j;
    picked = {top, first_id + i + j};
  }
}

// logits *= inverse, in place; their maximum and sum of exponentials.
static void tally(float inverse, float* logits, int count, Tally& to) {
  float top = -INFINITY, reached = 0;
  for (int i = 0; i < count; ++i) {
    logits[i] *= inverse;
    top = logits[i] > top ? logits[i] : top;
  }
  for (int i = 0; i < count; i += W) {
    const int n = count - i < W ? count - i : W;
    Vec v = load_part(logits + i, n);
    for (int j = n; j < W; ++j) v[j] = -INFINITY;
    reached += total(exp(v - top));
  }
  to = {top, reached};
}

static void collect(const float* logits, int first_id, int count, Candidates& c) {
  for (int i = 0; i < count; ++i) {
    if (!(logits[i] > c.least)) continue;
    c.logits[c.count] = logits[i];
    c.ids[c.count++] = first_id + i;
    if (c.count == 2 * Candidates::kKeep) shrink(c);
  }
}
