// Where the keys and values of every token are stored: in pages, which rows can share, in memory that never moves.
//
// A row is a sequence; position p of row r is in slot page_table[r][p / page_size] * page_size + p % page_size of the
// storage, which is owned elsewhere. Pages carry reference counts: a fork shares all pages of its parent, and the first
// of them to write into a partly filled shared page gets a copy of it (copy on write). The table and the lengths are
// allocated once, for the most that the layout can hold, so that pointers into them (and captured graphs) stay valid.
//
// Every operation checks its arguments before it changes anything, and throws std::invalid_argument. Only the
// constructor allocates memory. Not thread-safe: one owner at a time.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace coconut_fast {

// The free numbers among 0 .. size-1, as a bitmap: give() sets one bit, a search skips 64 numbers at a time.
class FreeSet {
 public:
  explicit FreeSet(int64_t size);

  int64_t size() const { return size_; }
  int64_t count() const { return count_; }
  bool contains(int64_t i) const { return words_[i / 64] >> (i % 64) & 1; }
  void give(int64_t i);
  // Takes the first free number at or after `start`, else the first of all. There must be one.
  int64_t take_from(int64_t start);

 private:
  int64_t first_from(int64_t start) const;  // or -1

  std::vector<uint64_t> words_;
  const int64_t size_;
  int64_t count_ = 0;
};

class CacheLayout {
 public:
  using Copy = std::pair<int64_t, int64_t>;  // page to read, page to write

  // Lengths and table entries are int32, and sizes must fit.
  CacheLayout(int64_t num_pages, int64_t page_size, int64_t max_rows, int64_t max_pages_per_row);

  // n fresh rows of length 0, written to `rows`.
  void alloc(int64_t n, int64_t* rows);

  // The total of counts, after checking that append(rows, counts) can be done.
  int64_t check_append(const int64_t* rows, const int64_t* counts, int64_t n) const;

  // Makes rows[i] longer by counts[i]. `slots` (as many as the total of counts) receives the new tokens' slots, row
  // after row; `copies` (up to n) the page copies to make before anything is written there. Returns their number.
  int64_t append(const int64_t* rows, const int64_t* counts, int64_t n, int64_t* slots, Copy* copies);

  // New rows (written to `forks`) that share everything with rows[i]; a row may be named several times.
  void fork(const int64_t* rows, int64_t n, int64_t* forks);

  // Drops the tokens of rows[i] beyond lengths[i].
  void truncate(const int64_t* rows, const int64_t* lengths, int64_t n);

  void free(const int64_t* rows, int64_t n);

  // Entries of a row beyond its length are stale, but always valid page numbers.
  int32_t* page_table() { return page_table_.data(); }
  int32_t* lengths() { return lengths_.data(); }
  const int32_t* page_table() const { return page_table_.data(); }
  const int32_t* lengths() const { return lengths_.data(); }
  int64_t page_size() const { return page_size_; }
  int64_t num_pages() const { return pages_.size(); }
  int64_t free_pages() const { return pages_.count(); }
  int64_t max_rows() const { return rows_.size(); }
  int64_t max_pages_per_row() const { return max_pages_per_row_; }
  int64_t rows_in_use() const { return rows_.size() - rows_.count(); }

 private:
  void check_row(const char* operation, int64_t row) const;
  void check_distinct(const char* operation, const int64_t* rows, int64_t n) const;
  int64_t pages_of(int64_t length) const { return (length + page_size_ - 1) / page_size_; }
  int32_t* pages(int64_t row) { return page_table_.data() + row * max_pages_per_row_; }
  const int32_t* pages(int64_t row) const { return page_table_.data() + row * max_pages_per_row_; }
  int32_t take_page(int64_t row, int64_t index);
  void drop_page(int32_t page);
  void drop_pages_beyond(int64_t row, int64_t length);

  FreeSet pages_, rows_;
  int64_t page_size_, max_pages_per_row_;
  std::vector<int32_t> page_table_, lengths_;
  std::vector<int32_t> references_;       // per page: how many rows hold it
  mutable std::vector<int32_t> sharers_;  // scratch of check_append, per page, all 0 between calls
  mutable std::vector<uint64_t> seen_;    // scratch of check_distinct, per row: the last call that named it
  mutable uint64_t call_ = 0;
};

}  // namespace coconut_fast
