// Residues to packed token rows: text in Python objects becomes one gap-padded uint8 array in one pass over the input.
//
// A call has two halves. With the GIL held, every record is pinned (a reference, or a memoryview for a buffer) and its
// length is read, which settles the layout. Then the GIL is released and threads write the rows; each takes an equal
// share of rows, so one titin or a million peptides are split alike. No Python object is made per residue.
//
// UTF-8 bytes are taken for ASCII, where bytes are code points, and their high bits are collected while they are
// translated. A record that has one is decoded by Python itself and the batch is written again: rare, and the tokens
// and the refusals are those of bytes.decode by construction.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86_KERNELS 1
#include <immintrin.h>
#endif

namespace py = pybind11;

namespace {

constexpr char kVocabulary[] = "ACDEFGHIKLMNPQRSTUVWXY";
constexpr uint8_t kOther = 22, kStart = 23, kEnd = 24, kPad = 25, kGap = 26;

// The vocabulary is A..Y without B, J and O: one subtraction for each hole that the letter lies behind. Without
// branches, so that compilers make vector code of loops over it.
template <typename CodePoint>
constexpr uint8_t token_of(CodePoint c) {
  const bool known = (c >= 'A') & (c <= 'Y') & (c != 'B') & (c != 'J') & (c != 'O');
  const auto token = static_cast<uint8_t>(c - 'A' - (c > 'B') - (c > 'J') - (c > 'O'));
  return static_cast<uint8_t>(kOther ^ ((token ^ kOther) & -static_cast<int>(known)));
}

template <size_t N>
constexpr std::array<uint8_t, N> tokens_from(int first) {
  std::array<uint8_t, N> table{};
  for (size_t i = 0; i < N; ++i) table[i] = token_of(first + static_cast<int>(i));
  return table;
}

constexpr bool vocabulary_agrees() {
  for (uint8_t token = 0; token < kOther; ++token)
    if (token_of(kVocabulary[token]) != token) return false;
  return sizeof(kVocabulary) == kOther + 1;
}
static_assert(vocabulary_agrees());

// ---- translation kernels: n Latin-1 bytes to n tokens; true if a byte is not ASCII ----
// Each byte is read once: others may write to a bytearray meanwhile.

using Translate = bool (*)(const uint8_t* in, int64_t n, uint8_t* out);

constexpr int64_t kBlock = 64;

// No table, a fixed size, no overlap: compilers make vector code of this for any processor.
uint8_t translate_block(const uint8_t* __restrict in, uint8_t* __restrict out) {
  uint8_t seen = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint8_t c = in[i];
    out[i] = token_of(c);
    seen |= c;
  }
  return seen;
}

bool translate_portable(const uint8_t* in, int64_t n, uint8_t* out) {
  uint8_t seen = 0;
  if (n < kBlock) {
    uint8_t text[kBlock] = {}, tokens[kBlock];
    std::memcpy(text, in, n);
    seen = translate_block(text, tokens);
    std::memcpy(out, tokens, n);
  } else {
    int64_t i = 0;
    for (; i + kBlock <= n; i += kBlock) seen |= translate_block(in + i, out + i);
    if (i < n) seen |= translate_block(in + n - kBlock, out + n - kBlock);  // overlaps the block before
  }
  return seen & 0x80;
}

#if X86_KERNELS
// Every residue lies in 0x40..0x5F: two look-ups in tables of 16. They give 0 where bit 7 of the index is set, so
// tokens are stored ^ OTHER; saturating + 0x70 sets that bit for all but 0..15.
alignas(16) constexpr auto kFrom0x40 = tokens_from<16>(0x40);
alignas(16) constexpr auto kFrom0x50 = tokens_from<16>(0x50);

__attribute__((target("avx2"))) bool translate_avx2(const uint8_t* in, int64_t n, uint8_t* out) {
  if (n < 32) return translate_portable(in, n, out);
  const __m256i other = _mm256_set1_epi8(kOther);
  const auto table = [&](const std::array<uint8_t, 16>& tokens) __attribute__((target("avx2"), always_inline)) {
    const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(tokens.data()));
    return _mm256_xor_si256(_mm256_broadcastsi128_si256(half), other);
  };
  const __m256i from_0x40 = table(kFrom0x40), from_0x50 = table(kFrom0x50);
  __m256i seen = _mm256_setzero_si256();
  const auto step = [&](int64_t i) __attribute__((target("avx2"), always_inline)) {
    const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    const __m256i low = _mm256_adds_epu8(_mm256_xor_si256(c, _mm256_set1_epi8(0x40)), _mm256_set1_epi8(0x70));
    const __m256i high = _mm256_adds_epu8(_mm256_xor_si256(c, _mm256_set1_epi8(0x50)), _mm256_set1_epi8(0x70));
    const __m256i known = _mm256_or_si256(_mm256_shuffle_epi8(from_0x40, low), _mm256_shuffle_epi8(from_0x50, high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_xor_si256(known, other));
    seen = _mm256_or_si256(seen, c);
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) step(i);
  if (i < n) step(n - 32);  // the last vector overlaps the one before
  return _mm256_movemask_epi8(seen) != 0;
}

// One look-up with an index of 7 bits: all of ASCII.
alignas(64) constexpr auto kAscii = tokens_from<128>(0);

__attribute__((target("avx512f,avx512bw,avx512vbmi"))) bool translate_avx512(const uint8_t* in, int64_t n,
                                                                             uint8_t* out) {
  const __m512i ascii_low = _mm512_load_si512(kAscii.data());
  const __m512i ascii_high = _mm512_load_si512(kAscii.data() + 64);
  const __m512i other = _mm512_set1_epi8(kOther);
  __mmask64 seen = 0;
  const auto tokens = [&](__m512i c) __attribute__((target("avx512f,avx512bw,avx512vbmi"), always_inline)) {
    const __mmask64 high = _mm512_movepi8_mask(c);
    seen |= high;
    return _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(ascii_low, c, ascii_high), high, other);
  };
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) _mm512_storeu_si512(out + i, tokens(_mm512_loadu_si512(in + i)));
  if (i < n) {
    const __mmask64 rest = ~0ULL >> (64 - (n - i));
    _mm512_mask_storeu_epi8(out + i, rest, tokens(_mm512_maskz_loadu_epi8(rest, in + i)));
  }
  return seen != 0;
}
#endif

struct Kernel {
  const char* name;
  Translate translate;
};

// Those that run on this processor, fastest first.
const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> available = [] {
    std::vector<Kernel> found;
#if X86_KERNELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi"))
      found.push_back({"avx512", translate_avx512});
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", translate_avx2});
#endif
    found.push_back({"portable", translate_portable});
    return found;
  }();
  return available;
}

Translate find_kernel(const std::string& name) {
  if (name.empty()) return kernels().front().translate;
  for (const Kernel& kernel : kernels())
    if (name == kernel.name) return kernel.translate;
  throw py::value_error("no kernel " + name + " on this processor");
}

// ---- sources: the str, bytes or memoryview behind each record ----

enum class Units : uint8_t { kBytes, kStridedBytes, kLatin1, kUcs2, kUcs4 };

struct View {
  const uint8_t* data;
  int64_t n;       // code units; code points too, unless the bytes turn out not to be ASCII
  int64_t stride;  // bytes from one unit to the next, for kStridedBytes alone
  Units units;

  bool is_bytes() const { return units <= Units::kStridedBytes; }
};

// Reads fields that never change while the source is referenced, so it needs no GIL.
View view_of(PyObject* source) {
  if (PyUnicode_Check(source)) {
    const auto kind = PyUnicode_KIND(source);
    const Units units = kind == PyUnicode_1BYTE_KIND   ? Units::kLatin1
                        : kind == PyUnicode_2BYTE_KIND ? Units::kUcs2
                                                       : Units::kUcs4;
    return {static_cast<const uint8_t*>(PyUnicode_DATA(source)), PyUnicode_GET_LENGTH(source), 1, units};
  }
  if (PyBytes_Check(source)) {
    const auto* data = reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(source));
    return {data, PyBytes_GET_SIZE(source), 1, Units::kBytes};
  }
  const Py_buffer* buffer = PyMemoryView_GET_BUFFER(source);
  const Py_ssize_t stride = buffer->strides[0];
  return {static_cast<const uint8_t*>(buffer->buf), buffer->shape[0], stride,
          stride == 1 ? Units::kBytes : Units::kStridedBytes};
}

template <typename Unit>
void translate_wide(const uint8_t* data, int64_t first, int64_t n, uint8_t* out) {
  const Unit* in = reinterpret_cast<const Unit*>(data) + first;
  for (int64_t i = 0; i < n; ++i) out[i] = token_of(in[i]);
}

// Tokens of n units from `first` on; true if they were bytes and not all ASCII.
bool translate_units(const View& view, int64_t first, int64_t n, uint8_t* out, Translate translate) {
  switch (view.units) {
    case Units::kBytes:
      return translate(view.data + first, n, out);
    case Units::kStridedBytes: {
      uint8_t seen = 0;
      for (int64_t i = 0; i < n; ++i) {
        const uint8_t c = view.data[(first + i) * view.stride];
        out[i] = token_of(c);
        seen |= c;
      }
      return seen & 0x80;
    }
    case Units::kLatin1:
      translate(view.data + first, n, out);
      return false;
    case Units::kUcs2:
      translate_wide<Py_UCS2>(view.data, first, n, out);
      return false;
    case Units::kUcs4:
      translate_wide<Py_UCS4>(view.data, first, n, out);
      return false;
  }
  return false;
}

bool is_ascii(const View& view) {
  uint8_t seen = 0;
  if (view.stride == 1)  // apart, so that the compiler makes vectors of it
    for (int64_t i = 0; i < view.n; ++i) seen |= view.data[i];
  else
    for (int64_t i = 0; i < view.n; ++i) seen |= view.data[i * view.stride];
  return !(seen & 0x80);
}

// Objects to fetch into the cache ahead of their turn: they lie anywhere, so the hardware cannot guess the next one.
constexpr Py_ssize_t kAhead = 16;  // when only headers are read
constexpr size_t kTextsAhead = 4;  // when the text is

// One source per sequence, in order. Holding them is what keeps their text valid while other threads run Python.
class Records {
 public:
  Records() = default;
  Records(const Records&) = delete;
  Records& operator=(const Records&) = delete;
  ~Records() {
    for (PyObject* source : sources_) Py_DECREF(source);
  }

  // A str, bytes, buffer or record stands for itself; anything else that can be iterated holds them.
  void gather(PyObject* sequences) {
    if (PyList_CheckExact(sequences) || PyTuple_CheckExact(sequences)) {
      reserve(PySequence_Fast_GET_SIZE(sequences));
      // The list is looked at anew each time: fetching an attribute of a record may run code that changes it.
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequences); ++i) {
        PyObject** const items = PySequence_Fast_ITEMS(sequences);
        if (i + kAhead < PySequence_Fast_GET_SIZE(sequences)) __builtin_prefetch(items[i + kAhead], 1);
        add_item(items[i]);
      }
      return;
    }
    if (add(sequences)) return;
    // Iterating these gives keys, or an order that changes from run to run.
    if (PyDict_Check(sequences) || PyAnySet_Check(sequences)) refuse(sequences);
    const auto iterator = py::reinterpret_steal<py::object>(PyObject_GetIter(sequences));
    if (!iterator) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
      PyErr_Clear();
      refuse(sequences);
    }
    while (const auto item = py::reinterpret_steal<py::object>(PyIter_Next(iterator.ptr()))) add_item(item.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  size_t size() const { return sources_.size(); }
  View view(size_t i) const { return view_of(sources_[i]); }

  // The head of a text; the hardware follows it from there.
  void prefetch(size_t i) const {
    const char* source = reinterpret_cast<const char*>(sources_[i]);
    for (int64_t k = 0; k < std::min<int64_t>(lengths[i], 1024); k += 64) __builtin_prefetch(source + k);
  }

  // Replaces bytes by the str that they decode to. Raises what bytes.decode raises, with the record named.
  void decode(size_t i) {
    const View view = this->view(i);
    if (!view.is_bytes()) return;
    std::string bytes(view.n, '\0');
    for (int64_t k = 0; k < view.n; ++k) bytes[k] = static_cast<char>(view.data[k * view.stride]);
    PyObject* const text = PyUnicode_DecodeUTF8(bytes.data(), view.n, "strict");
    if (!text) {
      const py::error_already_set error;
      if (size() > 1) error.value().attr("add_note")("in record " + std::to_string(i) + " of the sequences");
      throw error;
    }
    Py_SETREF(sources_[i], text);
    lengths[i] = PyUnicode_GET_LENGTH(text) + 2;
  }

  // Names of the records, if each of them has one.
  py::object ids() const {
    if (ids_.empty() || ids_.size() != size()) return py::none();
    py::tuple names(ids_.size());
    for (size_t i = 0; i < ids_.size(); ++i) names[i] = ids_[i];
    return names;
  }

  // Tokens of each record: START, one per code unit, END. Taken while its header is in the cache.
  std::vector<int64_t> lengths;

 private:
  [[noreturn]] static void refuse(PyObject* object, const std::string& where = "") {
    const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(object)));
    throw py::type_error("Unexpected sequence type: " + std::string(py::repr(type)) + where);
  }

  std::string here() const { return " (record " + std::to_string(size()) + ")"; }

  void reserve(size_t n) {
    sources_.reserve(n);
    lengths.reserve(n);
  }

  // Takes the reference.
  void hold(PyObject* source) {
    sources_.push_back(source);
    lengths.push_back(view_of(source).n + 2);
  }

  void add_item(PyObject* item) {
    // Held, because a list may drop it while its attributes are fetched.
    const auto held = py::reinterpret_borrow<py::object>(item);
    if (!add(item)) refuse(item, here());
  }

  bool add(PyObject* object) { return add_text(object) || add_record(py::reinterpret_borrow<py::object>(object)); }

  bool add_record(const py::object& record) {
    const py::object sequence = py::getattr(record, "sequence", py::none());
    const py::object id = py::getattr(record, "id", py::none());
    if (sequence.is_none() || id.is_none()) return false;
    if (!PyUnicode_Check(id.ptr())) throw py::type_error("the id of a record must be a str" + here());
    if (!add_text(sequence.ptr())) refuse(sequence.ptr(), here());
    ids_.push_back(id);
    return true;
  }

  bool add_text(PyObject* object) {
    if (PyUnicode_Check(object)) {
#if PY_VERSION_HEX < 0x030C0000
      if (PyUnicode_READY(object) != 0) throw py::error_already_set();
#endif
      hold(Py_NewRef(object));
      return true;
    }
    if (PyBytes_Check(object)) {
      hold(Py_NewRef(object));
      return true;
    }
    return PyObject_CheckBuffer(object) && add_buffer(object);
  }

  // bytearray, memoryview, numpy uint8: one dimension of unsigned bytes. The memoryview stops a bytearray from being
  // resized; bytes that others write meanwhile give one or the other token, never a wild read.
  bool add_buffer(PyObject* object) {
    auto view = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(object));
    if (!view) {
      PyErr_Clear();
      return false;
    }
    const Py_buffer* buffer = PyMemoryView_GET_BUFFER(view.ptr());
    if (buffer->ndim != 1 || buffer->suboffsets || std::strcmp(buffer->format, "B") != 0) return false;
    hold(view.release().ptr());
    return true;
  }

  std::vector<PyObject*> sources_;
  std::vector<py::object> ids_;
};

// ---- layout and filling ----

// splitmix64: the step that adds the golden ratio and mixes.
uint64_t splitmix64(uint64_t z) {
  z += 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

// Uniform in [0, n), a function of seed and record alone. Draw k of a record is splitmix64(key + k) cut to the bits
// that n - 1 has; the first draw below n is taken, so no value is favoured.
uint64_t draw_below(uint64_t n, uint64_t seed, uint64_t record) {
  uint64_t mask = n - 1;
  for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
  const uint64_t key = splitmix64(splitmix64(seed) ^ record);
  for (uint64_t k = 0;; ++k) {
    const uint64_t draw = splitmix64(key + k) & mask;
    if (draw < n) return draw;
  }
}

struct Window {
  int64_t length;
  uint64_t seed;
  const int64_t* indices;  // of the records, or null: their places in the batch

  // First token taken from record i, of `tokens` in all.
  int64_t start(size_t i, int64_t tokens) const {
    if (tokens <= length) return 0;
    const auto record = indices ? static_cast<uint64_t>(indices[i]) : i;
    return static_cast<int64_t>(draw_below(tokens - length + 1, seed, record));
  }
};

struct Layout {
  int64_t gap;
  const Window* window;                 // null: every protein is whole
  const std::vector<int64_t>& lengths;  // rows of each protein
  std::vector<int64_t> starts;          // its first row
};

// Writes rows [begin, end) of the packed array; adds to `not_ascii` the records that are bytes but not ASCII.
void fill(const Records& records, const Layout& layout, int64_t begin, int64_t end, uint8_t* rows,
          Translate translate, std::vector<size_t>& not_ascii) {
  const auto& [gap, window, lengths, starts] = layout;
  const auto write_gap = [&](int64_t from, int64_t to) {
    from = std::max(from, begin);
    to = std::min(to, end);
    if (from < to) std::memset(rows + from, kGap, to - from);
  };
  // The last protein that starts at or before `begin`, or the first.
  size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin();
  if (i > 0) --i;
  int64_t row = i > 0 ? starts[i] - gap : 0;
  for (; i < starts.size() && row < end; ++i) {
    write_gap(row, starts[i]);
    row = starts[i] + lengths[i];
    const int64_t from = std::max(starts[i], begin), to = std::min(row, end);
    if (from >= to) continue;
    if (i + kTextsAhead < starts.size()) records.prefetch(i + kTextsAhead);
    const View view = records.view(i);
    // Tokens [t, t_end) of START, units, END.
    const int64_t first = window ? window->start(i, view.n + 2) : 0;
    int64_t t = first + (from - starts[i]), t_end = first + (to - starts[i]);
    uint8_t* out = rows + from;
    if (t == 0) {
      *out++ = kStart;
      ++t;
    }
    if (t_end == view.n + 2) {
      rows[to - 1] = kEnd;
      --t_end;
    }
    if (t < t_end && translate_units(view, t - 1, t_end - t, out, translate)) not_ascii.push_back(i);
  }
  write_gap(row, row + gap);
}

// Runs work(t) for t in [0, n), each on a thread of its own where the system gives one.
template <typename Work>
void in_parallel(int64_t n, const Work& work) {
  std::vector<std::thread> threads;
  threads.reserve(n);
  for (int64_t t = 1; t < n; ++t) {
    try {
      threads.emplace_back([&work, t] { work(t); });
    } catch (const std::system_error&) {
      work(t);
    }
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
}

constexpr int64_t kRowsPerThread = 1 << 20;  // below this a thread costs more than it saves

// Hands a vector to numpy without a copy.
py::array_t<int64_t> to_numpy(std::vector<int64_t>&& values) {
  auto* const kept = new std::vector<int64_t>(std::move(values));
  const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::tuple pack_records(Records& records, int64_t gap, int64_t threads, Translate translate, const Window* window) {
  const auto decode = [&](std::vector<size_t>& not_ascii) {
    std::sort(not_ascii.begin(), not_ascii.end());  // the first bad record is the one that is reported
    for (const size_t i : not_ascii) records.decode(i);
  };

  if (window) {
    // Where a window lies depends on the number of code points, so all bytes are looked at before.
    std::vector<size_t> not_ascii;
    {
      py::gil_scoped_release released;
      for (size_t i = 0; i < records.size(); ++i) {
        const View view = records.view(i);
        if (view.is_bytes() && !is_ascii(view)) not_ascii.push_back(i);
      }
    }
    decode(not_ascii);
  }

  for (;;) {
    Layout layout{gap, window, records.lengths, {}};
    layout.starts.reserve(records.size());
    int64_t n_rows = gap;
    for (int64_t& length : records.lengths) {
      if (window) length = std::min(length, window->length);
      layout.starts.push_back(n_rows);
      n_rows += length + gap;
    }
    py::array_t<uint8_t> tokens(n_rows);  // numpy asks for huge pages, which spares most page faults
    uint8_t* const rows = tokens.mutable_data();
    const int64_t n_threads = std::clamp<int64_t>(n_rows / kRowsPerThread, 1, threads);
    std::vector<std::vector<size_t>> found(n_threads);
    {
      py::gil_scoped_release released;
      in_parallel(n_threads, [&](int64_t t) {
        fill(records, layout, n_rows * t / n_threads, n_rows * (t + 1) / n_threads, rows, translate, found[t]);
      });
    }
    std::vector<size_t> not_ascii;
    for (const auto& part : found) not_ascii.insert(not_ascii.end(), part.begin(), part.end());
    if (not_ascii.empty())
      return py::make_tuple(std::move(tokens), to_numpy(std::move(layout.starts)), to_numpy(std::move(records.lengths)),
                            records.ids());
    decode(not_ascii);
  }
}

// ---- the module ----

py::tuple pack(py::handle sequences, int64_t gap, int64_t threads, const std::string& kernel) {
  Records records;
  records.gather(sequences.ptr());
  return pack_records(records, gap, threads, find_kernel(kernel), nullptr);
}

py::tuple windows(py::handle sequences, int64_t length, uint64_t seed, std::optional<py::array_t<int64_t>> indices,
                  int64_t gap, int64_t threads, const std::string& kernel) {
  Records records;
  records.gather(sequences.ptr());
  if (indices && indices->size() != static_cast<py::ssize_t>(records.size())) {
    const py::object error = py::module_::import("proteinbert_fast.errors").attr("InputError");
    PyErr_Format(error.ptr(), "windows: %zd indices for %zu sequences", indices->size(), records.size());
    throw py::error_already_set();
  }
  const Window window{length, seed, indices ? indices->data() : nullptr};
  return pack_records(records, gap, threads, find_kernel(kernel), &window);
}

using Int64s = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Rows of proteins that are tokens already, as a corpus keeps them: without START and END, one behind the other.
py::tuple pack_tokens(const py::array_t<uint8_t, py::array::c_style>& tokens, const Int64s& offsets,
                      const Int64s& order, const Int64s& starts, const Int64s& sizes, int64_t gap) {
  const int64_t n = order.size(), n_given = offsets.size() - 1, n_tokens = tokens.size();
  if (starts.size() != n || sizes.size() != n || gap < 0) throw py::value_error("pack_tokens: sizes do not fit");
  Int64s first_rows(n);
  int64_t* const first_row = first_rows.mutable_data();
  int64_t n_rows = gap;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t protein = order.data()[i], start = starts.data()[i], size = sizes.data()[i];
    if (protein < 0 || protein >= n_given) throw py::value_error("pack_tokens: there is no such protein");
    const int64_t begin = offsets.data()[protein], end = offsets.data()[protein + 1];
    if (begin < 0 || end < begin || end > n_tokens) throw py::value_error("pack_tokens: offsets are not of these tokens");
    if (start < 0 || size < 1 || size > end - begin + 2 - start) throw py::value_error("pack_tokens: not a window");
    first_row[i] = n_rows;
    n_rows += size + gap;
  }
  py::array_t<uint8_t> packed(n_rows);
  uint8_t* const rows = packed.mutable_data();
  {
    const py::gil_scoped_release release;
    std::memset(rows, kGap, static_cast<size_t>(gap));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t protein = order.data()[i], start = starts.data()[i], size = sizes.data()[i];
      const int64_t begin = offsets.data()[protein], n_residues = offsets.data()[protein + 1] - begin;
      uint8_t* row = rows + first_row[i];
      uint8_t* const stop = row + size;
      if (start == 0) *row++ = kStart;
      const int64_t skipped = start == 0 ? 0 : start - 1;
      const int64_t copied = std::min<int64_t>(stop - row, n_residues - skipped);
      std::memcpy(row, tokens.data() + begin + skipped, static_cast<size_t>(copied));
      row += copied;
      if (row < stop) *row++ = kEnd;
      std::memset(row, kGap, static_cast<size_t>(gap));
    }
  }
  return py::make_tuple(packed, first_rows);
}

}  // namespace

PYBIND11_MODULE(_tokenizer, m) {
  m.attr("VOCABULARY") = kVocabulary;
  m.attr("OTHER") = kOther;
  m.attr("START") = kStart;
  m.attr("END") = kEnd;
  m.attr("PAD") = kPad;
  m.attr("GAP") = kGap;
  py::list names;
  for (const Kernel& kernel : kernels()) names.append(kernel.name);
  m.attr("kernels") = py::tuple(names);
  m.def("pack", &pack, py::arg("sequences"), py::arg("gap"), py::arg("threads"), py::arg("kernel") = "");
  m.def("windows", &windows, py::arg("sequences"), py::arg("length"), py::arg("seed"), py::arg("indices"),
        py::arg("gap"), py::arg("threads"), py::arg("kernel") = "");
  m.def("pack_tokens", &pack_tokens, py::arg("tokens"), py::arg("offsets"), py::arg("order"), py::arg("starts"),
        py::arg("sizes"), py::arg("gap"));
}
