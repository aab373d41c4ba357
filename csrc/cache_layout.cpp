#include "cache_layout.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

namespace coconut_fast {

namespace {

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

std::string text(int64_t value) { return std::to_string(value); }

int64_t in_range(const char* name, int64_t value, int64_t low, int64_t high = std::numeric_limits<int32_t>::max()) {
  if (value < low || value > high) {
    refuse(std::string("CacheLayout: ") + name + " is " + text(value) + ", must be " + text(low) + " to " + text(high));
  }
  return value;
}

}  // namespace

// ---- free set -----------------------------------------------------------------------------------------------------

FreeSet::FreeSet(int64_t size) : words_(size / 64 + 1), size_(size) {
  for (int64_t i = 0; i < size; ++i) give(i);
}

void FreeSet::give(int64_t i) {
  words_[i / 64] |= uint64_t{1} << (i % 64);
  ++count_;
}

int64_t FreeSet::take_from(int64_t start) {
  int64_t i = start < size_ ? first_from(start) : -1;
  if (i < 0) i = first_from(0);
  words_[i / 64] &= ~(uint64_t{1} << (i % 64));
  --count_;
  return i;
}

int64_t FreeSet::first_from(int64_t start) const {
  size_t word = start / 64;
  uint64_t bits = words_[word] & (~uint64_t{0} << (start % 64));
  while (bits == 0) {
    if (++word == words_.size()) return -1;
    bits = words_[word];
  }
  return static_cast<int64_t>(word) * 64 + std::countr_zero(bits);
}

// ---- layout -------------------------------------------------------------------------------------------------------

CacheLayout::CacheLayout(int64_t num_pages, int64_t page_size, int64_t max_rows, int64_t max_pages_per_row)
    : pages_(in_range("num_pages", num_pages, 1)),
      rows_(in_range("max_rows", max_rows, 1)),
      page_size_(in_range("page_size", page_size, 1)),
      max_pages_per_row_(in_range("max_pages_per_row", max_pages_per_row, 1)) {
  in_range("max_pages_per_row * page_size", max_pages_per_row * page_size, 1);
  in_range("max_rows * max_pages_per_row", max_rows * max_pages_per_row, 1);
  page_table_.resize(max_rows * max_pages_per_row);
  lengths_.resize(max_rows);
  references_.resize(num_pages);
  sharers_.resize(num_pages);
  seen_.resize(max_rows);
}

void CacheLayout::alloc(int64_t n, int64_t* rows) {
  if (n < 0) refuse("alloc: n is " + text(n) + ", must not be negative");
  if (n > rows_.count()) {
    refuse("alloc: " + text(n) + " rows are asked for, " + text(rows_.count()) + " of max_rows = " + text(max_rows()) +
           " are free");
  }
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = rows_.take_from(0);
    lengths_[rows[i]] = 0;
  }
}

int64_t CacheLayout::check_append(const int64_t* rows, const int64_t* counts, int64_t n) const {
  check_distinct("append", rows, n);
  const int64_t most = max_pages_per_row_ * page_size_;
  int64_t total = 0, needed = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t length = lengths_[rows[i]];
    if (counts[i] < 0) {
      refuse("append: counts[" + text(i) + "] is " + text(counts[i]) + ", must not be negative");
    }
    if (counts[i] > most - length) {
      refuse("append: row " + text(rows[i]) + " would be " + text(length) + " + " + text(counts[i]) +
             " tokens long, a row holds at most " + text(most));
    }
    total += counts[i];
    needed += pages_of(length + counts[i]) - pages_of(length);
  }
  // A page that r rows hold and m of them now write into is copied min(m, r - 1) times: the last row may keep it.
  const auto open_page = [&](int64_t i) {
    const int64_t length = lengths_[rows[i]];
    return counts[i] > 0 && length % page_size_ != 0 ? pages(rows[i])[length / page_size_] : -1;
  };
  for (int64_t i = 0; i < n; ++i) {
    const int32_t page = open_page(i);
    if (page >= 0 && ++sharers_[page] < references_[page]) ++needed;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (const int32_t page = open_page(i); page >= 0) sharers_[page] = 0;
  }
  if (needed > pages_.count()) {
    refuse("append: " + text(needed) + " pages are needed, " + text(pages_.count()) + " of " + text(num_pages()) +
           " are free");
  }
  return total;
}

int64_t CacheLayout::append(const int64_t* rows, const int64_t* counts, int64_t n, int64_t* slots, Copy* copies) {
  check_append(rows, counts, n);
  int64_t num_copies = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (counts[i] == 0) continue;
    const int64_t row = rows[i], begin = lengths_[row], end = begin + counts[i];
    int32_t* const table = pages(row);
    if (begin % page_size_ != 0) {
      int32_t& page = table[begin / page_size_];
      if (references_[page] > 1) {
        const int32_t shared = page;
        page = take_page(row, begin / page_size_);
        drop_page(shared);
        copies[num_copies++] = {shared, page};
      }
    }
    for (int64_t index = pages_of(begin); index < pages_of(end); ++index) table[index] = take_page(row, index);
    for (int64_t position = begin; position < end; ++position) {
      *slots++ = table[position / page_size_] * page_size_ + position % page_size_;
    }
    lengths_[row] = static_cast<int32_t>(end);
  }
  return num_copies;
}

void CacheLayout::fork(const int64_t* rows, int64_t n, int64_t* forks) {
  for (int64_t i = 0; i < n; ++i) check_row("fork", rows[i]);
  if (n > rows_.count()) {
    refuse("fork: " + text(n) + " rows are asked for, " + text(rows_.count()) + " of max_rows = " + text(max_rows()) +
           " are free");
  }
  for (int64_t i = 0; i < n; ++i) {
    forks[i] = rows_.take_from(0);
    const int64_t held = pages_of(lengths_[rows[i]]);
    const int32_t* const table = pages(rows[i]);
    std::copy(table, table + held, pages(forks[i]));
    for (int64_t index = 0; index < held; ++index) ++references_[table[index]];
    lengths_[forks[i]] = lengths_[rows[i]];
  }
}

void CacheLayout::truncate(const int64_t* rows, const int64_t* lengths, int64_t n) {
  check_distinct("truncate", rows, n);
  for (int64_t i = 0; i < n; ++i) {
    if (lengths[i] < 0 || lengths[i] > lengths_[rows[i]]) {
      refuse("truncate: lengths[" + text(i) + "] is " + text(lengths[i]) + ", must be 0 to " +
             text(lengths_[rows[i]]) + ", the length of row " + text(rows[i]));
    }
  }
  for (int64_t i = 0; i < n; ++i) drop_pages_beyond(rows[i], lengths[i]);
}

void CacheLayout::free(const int64_t* rows, int64_t n) {
  check_distinct("free", rows, n);
  for (int64_t i = 0; i < n; ++i) {
    drop_pages_beyond(rows[i], 0);
    rows_.give(rows[i]);
  }
}

// ---- inside -------------------------------------------------------------------------------------------------------

void CacheLayout::check_row(const char* operation, int64_t row) const {
  if (row < 0 || row >= max_rows() || rows_.contains(row)) {
    refuse(std::string(operation) + ": row " + text(row) + " is not in use (rows are 0 to " + text(max_rows() - 1) +
           ", from alloc or fork, until they are freed)");
  }
}

void CacheLayout::check_distinct(const char* operation, const int64_t* rows, int64_t n) const {
  ++call_;
  for (int64_t i = 0; i < n; ++i) {
    check_row(operation, rows[i]);
    if (seen_[rows[i]] == call_) {
      refuse(std::string(operation) + ": row " + text(rows[i]) + " is named twice in one call");
    }
    seen_[rows[i]] = call_;
  }
}

// Takes the first free page after the row's last one. The search for a row's first page starts at the row's share of
// the pages, so that rows that fit in their share stay contiguous in whatever order they grow.
int32_t CacheLayout::take_page(int64_t row, int64_t index) {
  const int64_t start = index > 0 ? pages(row)[index - 1] + 1 : row * num_pages() / max_rows();
  const auto page = static_cast<int32_t>(pages_.take_from(start));
  references_[page] = 1;
  return page;
}

void CacheLayout::drop_page(int32_t page) {
  if (--references_[page] == 0) pages_.give(page);
}

void CacheLayout::drop_pages_beyond(int64_t row, int64_t length) {
  for (int64_t index = pages_of(length); index < pages_of(lengths_[row]); ++index) drop_page(pages(row)[index]);
  lengths_[row] = static_cast<int32_t>(length);
}

}  // namespace coconut_fast
