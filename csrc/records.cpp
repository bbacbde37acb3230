// Protein records from UniRef XML, UniProtKB XML and UniProtKB flat files, and what a corpus builder does with many of
// them: hash their ids, put them in order, add the ancestors of their GO terms.
//
// Text comes in pieces of any size. A reader keeps what a piece leaves unfinished (a tag, a line), so memory does not
// depend on the size of a file; records leave as columns, and no Python object is made per record.
//
// XML is checked as XML, not searched for patterns: nesting, attributes, references, comments, characters and UTF-8.
// Refused although XML allows it: document types (and so declared entities), names outside ASCII, and other encodings
// than UTF-8. Files of UniProt have none of these.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace py = pybind11;
using std::string_view;

namespace {

constexpr size_t kLongest = size_t{1} << 26;  // bytes of one tag, text or line; titin's sequence has 35,000
constexpr size_t kDeepest = 64;               // nested elements; UniProt's files have 8
constexpr int32_t kMalformedGo = -1;

struct Malformed {
  int64_t line;
  int64_t column;  // 0: the whole line
  std::string what;
};

bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
bool is_letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name_start(char c) { return is_letter(c) || c == '_' || c == ':'; }
bool is_name(char c) { return is_name_start(c) || is_digit(c) || c == '-' || c == '.'; }

bool starts_with(string_view text, string_view with) { return text.substr(0, with.size()) == with; }

std::string shown(string_view text) {
  std::string out;
  for (const char c : text.substr(0, 40)) out += (c >= 0x20 && c < 0x7f) ? c : '?';
  return text.size() > 40 ? out + "..." : out;
}

// GO:0005515 is 5515.
int32_t go_number(string_view text) {
  if (text.size() != 10 || !starts_with(text, "GO:")) return kMalformedGo;
  int32_t number = 0;
  for (const char c : text.substr(3)) {
    if (!is_digit(c)) return kMalformedGo;
    number = 10 * number + (c - '0');
  }
  return number;
}

std::optional<int64_t> to_int(string_view text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || text.empty()) return std::nullopt;
  return number;
}

// ---- columns ----

template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
  auto* const kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

struct Columns {
  std::vector<uint8_t> ids, tokens;
  std::vector<int64_t> id_offsets{0}, token_offsets{0}, go_offsets{0}, lines;
  std::vector<int32_t> go;

  py::tuple to_python() {
    py::tuple out = py::make_tuple(to_numpy(std::move(ids)), to_numpy(std::move(id_offsets)),
                                   to_numpy(std::move(tokens)), to_numpy(std::move(token_offsets)),
                                   to_numpy(std::move(go)), to_numpy(std::move(go_offsets)), to_numpy(std::move(lines)));
    *this = Columns();
    return out;
  }
};

// The record that is being read.
struct Record {
  int64_t line = 0;
  std::string id, sequence;
  std::vector<int32_t> go;
  int64_t length = -1;  // as the file states it
  bool has_sequence = false;

  void reset(int64_t at) {
    line = at;
    id.clear();
    sequence.clear();
    go.clear();
    length = -1;
    has_sequence = false;
  }

  std::string name() const { return id.empty() ? "" : " " + shown(id); }

  void add_residues(string_view text) {
    for (const char c : text)
      if (!is_blank(c)) sequence += c;
  }

  // Empty, or what is wrong with the sequence.
  std::string check_sequence() const {
    if (sequence.empty()) return "the sequence is empty";
    for (const char c : sequence)
      if (!is_letter(c)) return "the sequence has a character that is no letter: '" + shown(string_view(&c, 1)) + "'";
    if (length >= 0 && length != static_cast<int64_t>(sequence.size()))
      return "the sequence has " + std::to_string(sequence.size()) + " residues where its length says " +
             std::to_string(length);
    return "";
  }

  void append_to(Columns& columns, const std::array<uint8_t, 256>& token_of) const {
    columns.ids.insert(columns.ids.end(), id.begin(), id.end());
    columns.id_offsets.push_back(static_cast<int64_t>(columns.ids.size()));
    const size_t first = columns.tokens.size();
    columns.tokens.resize(first + sequence.size());
    for (size_t i = 0; i < sequence.size(); ++i)
      columns.tokens[first + i] = token_of[static_cast<uint8_t>(sequence[i])];
    columns.token_offsets.push_back(static_cast<int64_t>(columns.tokens.size()));
    columns.go.insert(columns.go.end(), go.begin(), go.end());
    columns.go_offsets.push_back(static_cast<int64_t>(columns.go.size()));
    columns.lines.push_back(line);
  }
};

// What every kind of file has: text that comes in pieces, and a place in it.
class Reader {
 public:
  explicit Reader(const std::array<uint8_t, 256>& token_of) : token_of_(token_of) {}
  virtual ~Reader() = default;

  void feed(string_view piece, bool last) {
    drop(at_);
    buffer_.append(piece);
    read(last);
    if (buffer_.size() - at_ > kLongest) fail(at_, "a tag, text or line of more than 64 MB");
  }

  Columns columns;

 protected:
  // Reads from at_ as far as it goes; with `last`, to the end.
  virtual void read(bool last) = 0;

  [[noreturn]] void fail(size_t at, const std::string& what, bool with_column = true) {
    const int64_t line = line_at(at);
    const size_t line_end = at > 0 ? buffer_.rfind('\n', at - 1) : std::string::npos;
    const int64_t column =
        line_end == std::string::npos ? column_ + static_cast<int64_t>(at) : static_cast<int64_t>(at - line_end - 1);
    throw Malformed{line, with_column ? column + 1 : 0, what};
  }

  // Asked in order of places: each stretch is counted once.
  int64_t line_at(size_t at) {
    if (at > counted_) {
      line_ += std::count(buffer_.begin() + static_cast<ptrdiff_t>(counted_),
                          buffer_.begin() + static_cast<ptrdiff_t>(at), '\n');
      counted_ = at;
    }
    return line_ - std::count(buffer_.begin() + static_cast<ptrdiff_t>(at),
                              buffer_.begin() + static_cast<ptrdiff_t>(counted_), '\n');
  }

  virtual void drop(size_t n) {
    line_at(n);
    const size_t line_end = n > 0 ? buffer_.rfind('\n', n - 1) : std::string::npos;
    column_ = line_end == std::string::npos ? column_ + static_cast<int64_t>(n) : static_cast<int64_t>(n - line_end - 1);
    buffer_.erase(0, n);
    at_ -= n;
    counted_ -= n;
    dropped_ += n;
  }

  std::string buffer_;
  size_t at_ = 0;        // read up to here
  size_t dropped_ = 0;   // bytes before the buffer
  Record record_;
  std::array<uint8_t, 256> token_of_;

 private:
  int64_t line_ = 1, column_ = 0;
  size_t counted_ = 0;
};

// ---- XML ----

struct Attribute {
  string_view name, value;  // as written, references not yet resolved
};

class XmlReader : public Reader {
 public:
  using Reader::Reader;

 protected:
  virtual void start(string_view name, size_t depth) = 0;  // depth of the root is 0
  virtual void text(string_view) {}
  virtual void end(size_t depth) = 0;

  // The value of an attribute, resolved; null if there is none. Valid until asked again.
  const std::string* attribute(string_view name) {
    for (const Attribute& found : attributes_) {
      if (found.name != name) continue;
      value_.clear();
      resolve(found.value, &value_);
      return &value_;
    }
    return nullptr;
  }

  // The same where most values have no reference in them: no copy.
  string_view raw_attribute(string_view name) const {
    for (const Attribute& found : attributes_)
      if (found.name == name) return found.value;
    return {};
  }

  bool wants_text_ = false;
  size_t tag_at_ = 0;

  void read(bool last) override {
    check_characters(last);
    if (dropped_ == 0 && at_ == 0) {
      if (buffer_.size() < 5 && !last) return;
      if (starts_with(buffer_, "\xef\xbb\xbf")) at_ = 3;
      begin_ = at_;
    }
    while (at_ < valid_) {
      if (buffer_[at_] == '<') {
        if (!markup()) break;
        continue;
      }
      const void* const found = std::memchr(&buffer_[at_], '<', valid_ - at_);
      if (!found && !last) break;
      const size_t stop = found ? static_cast<size_t>(static_cast<const char*>(found) - buffer_.data()) : valid_;
      characters(string_view(buffer_).substr(at_, stop - at_));
      at_ = stop;
    }
    if (!last) return;
    if (at_ < buffer_.size()) fail(at_, "the file ends within a tag");
    if (!open_.empty())
      fail(at_, "the file ends within <" + open_.back().name + ">, opened in line " + std::to_string(open_.back().line));
    if (!has_root_) fail(at_, "the file holds no XML element");
  }

  void drop(size_t n) override {
    Reader::drop(n);
    valid_ -= n;
  }

 private:
  struct Open {
    std::string name;
    int64_t line;
  };

  // Control characters and UTF-8, up to the last whole code point.
  void check_characters(bool last) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(buffer_.data());
    const size_t n = buffer_.size();
    size_t i = valid_;
    while (i < n) {
      // A block of plain text at a time, without branches.
      constexpr size_t kBlock = 256;
      if (i + kBlock <= n) {
        uint8_t odd = 0;
        for (size_t k = 0; k < kBlock; ++k) {
          const uint8_t c = bytes[i + k];
          odd |= static_cast<uint8_t>((c >= 0x80) | ((c < 0x20) & (c != '\n') & (c != '\t') & (c != '\r')));
        }
        if (!odd) {
          i += kBlock;
          continue;
        }
      }
      const size_t stop = std::min(n, i + kBlock);
      while (i < stop) {
        const uint8_t c = bytes[i];
        if (c < 0x80) {
          if (c < 0x20 && c != '\n' && c != '\t' && c != '\r') fail(i, "a control character, which XML does not allow");
          ++i;
          continue;
        }
        const size_t size = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
        if (i + size > n) {
          if (last) fail(i, "is not UTF-8 text");
          valid_ = i;
          return;
        }
        static constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
        uint32_t point = c & (0x7f >> size);
        bool good = c >= 0xc2 && c <= 0xf4;
        for (size_t k = 1; k < size; ++k) {
          good &= (bytes[i + k] & 0xc0) == 0x80;
          point = (point << 6) | (bytes[i + k] & 0x3f);
        }
        if (!good || point < kLeast[size] || !is_xml_character(point)) fail(i, "is not UTF-8 text that XML allows");
        i += size;
      }
    }
    valid_ = n;
  }

  static bool is_xml_character(uint32_t c) {
    return c == 9 || c == 10 || c == 13 || (c >= 0x20 && c <= 0xd7ff) || (c >= 0xe000 && c <= 0xfffd) ||
           (c >= 0x10000 && c <= 0x10ffff);
  }

  // Resolves references into `out`, or only checks them. Line ends are left as they are: nothing here depends on them.
  void resolve(string_view text, std::string* out) {
    for (size_t i = 0; i < text.size();) {
      const size_t amp = text.find('&', i);
      if (out) out->append(text.substr(i, amp == string_view::npos ? text.size() - i : amp - i));
      if (amp == string_view::npos) return;
      const size_t place = static_cast<size_t>(text.data() - buffer_.data()) + amp;
      const size_t semicolon = text.find(';', amp);
      if (semicolon == string_view::npos) fail(place, "'&' without a reference");
      const string_view name = text.substr(amp + 1, semicolon - amp - 1);
      char32_t point = 0;
      if (name == "lt") point = '<';
      else if (name == "gt") point = '>';
      else if (name == "amp") point = '&';
      else if (name == "quot") point = '"';
      else if (name == "apos") point = '\'';
      else if (name.size() > 1 && name[0] == '#') {
        const bool hex = name[1] == 'x';
        const string_view digits = name.substr(hex ? 2 : 1);
        uint32_t number = 0;
        const auto [stop, error] =
            std::from_chars(digits.data(), digits.data() + digits.size(), number, hex ? 16 : 10);
        if (digits.empty() || error != std::errc() || stop != digits.data() + digits.size() || !is_xml_character(number))
          fail(place, "the reference &" + shown(name) + "; is no character");
        point = number;
      }
      if (!point) fail(place, "the reference &" + shown(name) + "; is not known");
      if (out) append_utf8(*out, point);
      i = semicolon + 1;
    }
  }

  static void append_utf8(std::string& out, char32_t c) {
    if (c < 0x80) {
      out += static_cast<char>(c);
    } else if (c < 0x800) {
      out += static_cast<char>(0xc0 | (c >> 6));
      out += static_cast<char>(0x80 | (c & 0x3f));
    } else if (c < 0x10000) {
      out += static_cast<char>(0xe0 | (c >> 12));
      out += static_cast<char>(0x80 | ((c >> 6) & 0x3f));
      out += static_cast<char>(0x80 | (c & 0x3f));
    } else {
      out += static_cast<char>(0xf0 | (c >> 18));
      out += static_cast<char>(0x80 | ((c >> 12) & 0x3f));
      out += static_cast<char>(0x80 | ((c >> 6) & 0x3f));
      out += static_cast<char>(0x80 | (c & 0x3f));
    }
  }

  void characters(string_view found) {
    if (open_.empty()) {
      for (size_t i = 0; i < found.size(); ++i)
        if (!is_blank(found[i])) fail(at_ + i, "text outside of any element: is this XML?");
      return;
    }
    const size_t end_of_section = found.find("]]>");
    if (end_of_section != string_view::npos) fail(at_ + end_of_section, "']]>' in text");
    if (!wants_text_) {
      if (std::memchr(found.data(), '&', found.size())) resolve(found, nullptr);
      return;
    }
    value_.clear();
    resolve(found, &value_);
    text(value_);
  }

  // One tag, comment or instruction at at_. False: its end is still to come.
  bool markup() {
    const string_view rest(buffer_.data() + at_, valid_ - at_);
    if (rest.size() < 2) return false;
    if (rest[1] == '?') return instruction(rest);
    if (rest[1] == '!') {
      for (const string_view opening : {string_view("<!--"), string_view("<![CDATA[")}) {
        if (rest.size() < opening.size() && starts_with(opening, rest)) return false;
        if (starts_with(rest, opening)) return opening[2] == '-' ? comment(rest) : section(rest);
      }
      fail(at_, starts_with(rest, "<!D") ? "a document type declaration, which is not read" : "'<!' that opens nothing");
    }
    return rest[1] == '/' ? end_tag(rest) : start_tag(rest);
  }

  bool instruction(string_view rest) {
    const size_t stop = rest.find("?>");
    if (stop == string_view::npos) return false;
    const string_view body = rest.substr(2, stop - 2);
    size_t n = 0;
    while (n < body.size() && is_name(body[n])) ++n;
    const string_view target = body.substr(0, n);
    if (target.empty() || !is_name_start(target[0]) || (n < body.size() && !is_blank(body[n])))
      fail(at_, "a processing instruction without a name");
    if (target.size() == 3 && (target[0] | 32) == 'x' && (target[1] | 32) == 'm' && (target[2] | 32) == 'l') {
      if (dropped_ + at_ != begin_ || target != "xml") fail(at_, "an XML declaration that is not at the start");
      declaration(body.substr(3));
    }
    at_ += stop + 2;
    return true;
  }

  void declaration(string_view body) {
    static constexpr string_view kNames[] = {"version", "encoding", "standalone"};
    size_t next = 0, i = 0;
    while (true) {
      const size_t before = i;
      while (i < body.size() && is_blank(body[i])) ++i;
      if (i == body.size()) break;
      size_t n = i;
      while (n < body.size() && is_letter(body[n])) ++n;
      const string_view name = body.substr(i, n - i);
      while (n < body.size() && is_blank(body[n])) ++n;
      if (i == before || n == body.size() || body[n] != '=') fail(at_, "a malformed XML declaration");
      for (++n; n < body.size() && is_blank(body[n]);) ++n;
      if (n == body.size() || (body[n] != '"' && body[n] != '\'')) fail(at_, "a malformed XML declaration");
      const size_t quote = body.find(body[n], n + 1);
      if (quote == string_view::npos) fail(at_, "a malformed XML declaration");
      std::string value(body.substr(n + 1, quote - n - 1));
      i = quote + 1;
      while (next < 3 && kNames[next] != name && next > 0) ++next;
      if (next == 3 || kNames[next] != name) fail(at_, "a malformed XML declaration");
      ++next;
      if (name == "version" && value != "1.0" && value != "1.1") fail(at_, "XML of version " + shown(value));
      if (name == "standalone" && value != "yes" && value != "no") fail(at_, "a malformed XML declaration");
      if (name != "encoding") continue;
      for (char& c : value) c = static_cast<char>(is_letter(c) ? c & ~32 : c);
      if (value != "UTF-8" && value != "US-ASCII" && value != "ASCII" && value != "UTF8")
        fail(at_, "the encoding " + shown(value) + " is not read: UTF-8 is");
    }
    if (next == 0) fail(at_, "a malformed XML declaration");
  }

  bool comment(string_view rest) {
    const size_t dashes = rest.find("--", 4);
    if (dashes == string_view::npos || dashes + 2 >= rest.size()) return false;
    if (rest[dashes + 2] != '>') fail(at_ + dashes, "'--' in a comment");
    at_ += dashes + 3;
    return true;
  }

  bool section(string_view rest) {
    if (open_.empty()) fail(at_, "text outside of any element");
    const size_t stop = rest.find("]]>");
    if (stop == string_view::npos) return false;
    if (wants_text_) text(rest.substr(9, stop - 9));
    at_ += stop + 3;
    return true;
  }

  bool end_tag(string_view rest) {
    size_t i = 2;
    while (i < rest.size() && is_name(rest[i])) ++i;
    const string_view name = rest.substr(2, i - 2);
    while (i < rest.size() && is_blank(rest[i])) ++i;
    if (i == rest.size()) return false;
    if (rest[i] != '>') fail(at_ + i, "a malformed end tag");
    if (open_.empty()) fail(at_, "</" + shown(name) + "> closes nothing");
    if (open_.back().name != name)
      fail(at_, "</" + shown(name) + "> where </" + open_.back().name + "> was expected, opened in line " +
                    std::to_string(open_.back().line));
    tag_at_ = at_;
    end(open_.size() - 1);
    open_.pop_back();
    at_ += i + 1;
    return true;
  }

  bool start_tag(string_view rest) {
    size_t i = 1;
    if (!is_name_start(rest[1])) fail(at_, "'<' that opens no tag");
    while (i < rest.size() && is_name(rest[i])) ++i;
    const string_view name = rest.substr(1, i - 1);
    attributes_.clear();
    bool closes = false;
    while (true) {
      const size_t before = i;
      while (i < rest.size() && is_blank(rest[i])) ++i;
      if (i == rest.size()) return false;
      if (rest[i] == '>') break;
      if (rest[i] == '/') {
        if (i + 1 == rest.size()) return false;
        if (rest[i + 1] != '>') fail(at_ + i, "'/' within a tag");
        closes = true;
        ++i;
        break;
      }
      if (i == before) fail(at_ + i, "a malformed tag <" + shown(name) + ">");
      const size_t first = i;
      if (!is_name_start(rest[i])) fail(at_ + i, "a malformed attribute of <" + shown(name) + ">");
      while (i < rest.size() && is_name(rest[i])) ++i;
      const string_view attribute = rest.substr(first, i - first);
      while (i < rest.size() && is_blank(rest[i])) ++i;
      if (i == rest.size()) return false;
      if (rest[i] != '=') fail(at_ + i, "the attribute " + shown(attribute) + " has no value");
      for (++i; i < rest.size() && is_blank(rest[i]);) ++i;
      if (i == rest.size()) return false;
      const char quote = rest[i++];
      if (quote != '"' && quote != '\'')
        fail(at_ + i - 1, "the value of the attribute " + shown(attribute) + " is not in quotes");
      const size_t stop = rest.find(quote, i);
      const string_view value = rest.substr(i, stop == string_view::npos ? string_view::npos : stop - i);
      if (!value.empty()) {
        if (const void* at = std::memchr(value.data(), '<', value.size()))
          fail(static_cast<size_t>(static_cast<const char*>(at) - buffer_.data()), "'<' in the value of an attribute");
        if (stop != string_view::npos && std::memchr(value.data(), '&', value.size())) resolve(value, nullptr);
      }
      if (stop == string_view::npos) return false;
      for (const Attribute& other : attributes_)
        if (other.name == attribute) fail(at_ + first, "the attribute " + shown(attribute) + " occurs twice");
      attributes_.push_back({attribute, value});
      i = stop + 1;
    }
    const size_t depth = open_.size();
    if (depth == 0 && has_root_) fail(at_, "a second root element <" + shown(name) + ">");
    if (depth == kDeepest) fail(at_, "elements nested more than " + std::to_string(kDeepest) + " deep");
    has_root_ = true;
    tag_at_ = at_;
    start(name, depth);
    if (closes) {
      end(depth);
    } else {
      open_.push_back({std::string(name), depth < 4 ? line_at(at_) : 0});
      if (depth >= 4) open_.back().line = open_[3].line;  // near enough, and counting costs
    }
    at_ += i + 1;
    return true;
  }

  std::vector<Open> open_;
  std::vector<Attribute> attributes_;
  std::string value_;
  size_t valid_ = 0;  // characters are checked up to here
  size_t begin_ = 0;  // where an XML declaration may stand
  bool has_root_ = false;
};

class UniRefReader : public XmlReader {
 public:
  using XmlReader::XmlReader;

 private:
  void start(string_view name, size_t depth) override {
    if (wants_text_) fail(tag_at_, "an element within a sequence of entry" + record_.name());
    if (depth == 0) {
      const string_view space = raw_attribute("xmlns");
      const bool known = name == "UniRef" || name == "UniRef100" || name == "UniRef90" || name == "UniRef50";
      if (!known || (space != "http://uniprot.org/uniref" && space != "https://uniprot.org/uniref"))
        fail(tag_at_, "the root element <" + shown(name) + "> is not that of UniRef XML");
    } else if (depth == 1) {
      if (name != "entry") fail(tag_at_, "<" + shown(name) + "> where UniRef XML has <entry>");
      record_.reset(line_at(tag_at_));
      has_representative_ = in_representative_ = false;
      const std::string* const id = attribute("id");
      if (!id || id->empty()) fail(tag_at_, "an entry without an id");
      record_.id = *id;
    } else if (depth == 2) {
      in_representative_ = name == "representativeMember";
      if (in_representative_) {
        if (has_representative_) fail(tag_at_, "entry" + record_.name() + " has two representative members");
        has_representative_ = true;
      } else if (name == "property" && starts_with(raw_attribute("type"), "GO ")) {
        const std::string* const value = attribute("value");
        record_.go.push_back(value ? go_number(*value) : kMalformedGo);
      }
    } else if (depth == 3 && in_representative_ && name == "sequence") {
      if (record_.has_sequence) fail(tag_at_, "entry" + record_.name() + " has two sequences");
      record_.has_sequence = wants_text_ = true;
      if (const std::string* const length = attribute("length")) {
        const auto number = to_int(*length);
        if (!number || *number < 0) fail(tag_at_, "the length " + shown(*length) + " is no number");
        record_.length = *number;
      }
    }
  }

  void text(string_view residues) override { record_.add_residues(residues); }

  void end(size_t depth) override {
    if (depth == 3 && wants_text_) {
      wants_text_ = false;
      const std::string wrong = record_.check_sequence();
      if (!wrong.empty()) fail(tag_at_, "entry" + record_.name() + ": " + wrong);
    } else if (depth == 2) {
      in_representative_ = false;
    } else if (depth == 1) {
      if (!has_representative_) fail(tag_at_, "entry" + record_.name() + " has no representative member");
      record_.append_to(columns, token_of_);
    }
  }

  bool has_representative_ = false, in_representative_ = false;
};

class UniProtReader : public XmlReader {
 public:
  using XmlReader::XmlReader;

 private:
  void start(string_view name, size_t depth) override {
    if (wants_text_) fail(tag_at_, "an element within an accession or sequence of entry" + record_.name());
    if (depth == 0) {
      const string_view space = raw_attribute("xmlns");
      if (name != "uniprot" || (space != "http://uniprot.org/uniprot" && space != "https://uniprot.org/uniprot"))
        fail(tag_at_, "the root element <" + shown(name) + "> is not that of UniProtKB XML");
    } else if (depth == 1) {
      if (name != "entry" && name != "copyright") fail(tag_at_, "<" + shown(name) + "> where UniProtKB XML has <entry>");
      in_entry_ = name == "entry";
      record_.reset(line_at(tag_at_));
    } else if (depth == 2 && in_entry_) {
      if (name == "accession" && record_.id.empty()) {
        wants_text_ = in_accession_ = true;
      } else if (name == "dbReference" && raw_attribute("type") == "GO") {
        const std::string* const id = attribute("id");
        record_.go.push_back(id ? go_number(*id) : kMalformedGo);
      } else if (name == "sequence") {
        if (record_.has_sequence) fail(tag_at_, "entry" + record_.name() + " has two sequences");
        record_.has_sequence = wants_text_ = true;
        if (const std::string* const length = attribute("length")) {
          const auto number = to_int(*length);
          if (!number || *number < 0) fail(tag_at_, "the length " + shown(*length) + " is no number");
          record_.length = *number;
        }
      }
    }
  }

  void text(string_view found) override {
    if (!in_accession_) return record_.add_residues(found);
    for (const char c : found)
      if (!is_blank(c)) record_.id += c;
  }

  void end(size_t depth) override {
    if (depth == 2 && wants_text_) {
      wants_text_ = false;
      if (!std::exchange(in_accession_, false)) {
        const std::string wrong = record_.check_sequence();
        if (!wrong.empty()) fail(tag_at_, "entry" + record_.name() + ": " + wrong);
      }
    } else if (depth == 1 && in_entry_) {
      if (record_.id.empty()) fail(tag_at_, "an entry without an accession");
      if (!record_.has_sequence) fail(tag_at_, "entry" + record_.name() + " has no sequence");
      record_.append_to(columns, token_of_);
    }
  }

  bool in_entry_ = false, in_accession_ = false;
};

// ---- flat files ----

class FlatReader : public Reader {
 public:
  using Reader::Reader;

 private:
  void read(bool last) override {
    while (at_ < buffer_.size()) {
      const size_t found = buffer_.find('\n', at_);
      if (found == std::string::npos && !last) return;
      const size_t stop = found == std::string::npos ? buffer_.size() : found;
      string_view text(buffer_.data() + at_, stop - at_);
      if (!text.empty() && text.back() == '\r') text.remove_suffix(1);
      line(text);
      at_ = std::min(stop + 1, buffer_.size());
    }
    if (last && in_entry_) fail(at_, "the file ends within entry" + record_.name(), false);
  }

  void line(string_view text) {
    if (!in_entry_) {
      if (text.find_first_not_of(" \t") == string_view::npos) return;
      if (!starts_with(text, "ID   ")) fail(at_, "not a UniProtKB entry: '" + shown(text) + "' where ID was expected", false);
      record_.reset(line_at(at_));
      in_entry_ = true;
    } else if (text == "//") {
      std::string wrong = record_.id.empty() ? "no accession (AC line)" : record_.check_sequence();
      if (!record_.has_sequence && wrong == "the sequence is empty") wrong = "no sequence (SQ line)";
      if (!wrong.empty()) fail(at_, "entry" + record_.name() + ": " + wrong, false);
      record_.append_to(columns, token_of_);
      in_entry_ = false;
    } else if (record_.has_sequence) {
      if (!starts_with(text, "  ")) fail(at_, "entry" + record_.name() + ": '" + shown(text) + "' within the sequence", false);
      record_.add_residues(text);
    } else if (starts_with(text, "AC   ")) {
      const string_view first = text.substr(5, text.find(';') == string_view::npos ? 0 : text.find(';') - 5);
      if (record_.id.empty()) record_.id = first;
    } else if (starts_with(text, "DR   GO;")) {
      const string_view rest = text.substr(8);
      const size_t begin = std::min(rest.find_first_not_of(' '), rest.size());
      record_.go.push_back(go_number(rest.substr(begin, rest.find(';', begin) - begin)));
    } else if (starts_with(text, "SQ   SEQUENCE")) {
      const string_view rest = text.substr(13);
      const size_t begin = std::min(rest.find_first_not_of(' '), rest.size());
      const auto number = to_int(rest.substr(begin, rest.find(' ', begin) - begin));
      if (!number) fail(at_, "entry" + record_.name() + ": an SQ line without a length", false);
      record_.length = *number;
      record_.has_sequence = true;
    } else if (starts_with(text, "ID   ")) {
      fail(at_, "entry" + record_.name() + " has no end (//) before this line", false);
    }
  }

  bool in_entry_ = false;
};

// ---- Python's view of a reader ----

[[noreturn]] void raise_input_error(const std::string& message) {
  const py::object error = py::module_::import("proteinbert_fast.errors").attr("InputError");
  PyErr_SetString(error.ptr(), message.c_str());
  throw py::error_already_set();
}

class RecordReader {
 public:
  RecordReader(const std::string& format, std::string name, const py::bytes& tokens) : name_(std::move(name)) {
    const auto table = static_cast<string_view>(tokens);
    if (table.size() != 256) throw py::value_error("a token for each of 256 bytes is needed");
    std::array<uint8_t, 256> token_of;
    std::copy(table.begin(), table.end(), token_of.begin());
    if (format == "uniref-xml") reader_ = std::make_unique<UniRefReader>(token_of);
    else if (format == "uniprot-xml") reader_ = std::make_unique<UniProtReader>(token_of);
    else if (format == "uniprot-text") reader_ = std::make_unique<FlatReader>(token_of);
    else throw py::value_error("unknown format " + format);
  }

  py::tuple feed(const py::bytes& piece, bool last) {
    if (!damage_.empty()) raise_input_error(damage_);
    const auto text = static_cast<string_view>(piece);
    {
      py::gil_scoped_release released;
      try {
        reader_->feed(text, last);
      } catch (const Malformed& found) {
        damage_ = name_ + ":" + std::to_string(found.line) +
                  (found.column ? ":" + std::to_string(found.column) : "") + ": " + found.what;
      }
    }
    // Records before the damage still leave: the caller learns of it with the next call.
    if (!damage_.empty() && reader_->columns.lines.empty()) raise_input_error(damage_);
    return reader_->columns.to_python();
  }

 private:
  std::string name_, damage_;
  std::unique_ptr<Reader> reader_;
};

// ---- many records ----

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Longs = py::array_t<int64_t, py::array::c_style>;

void check_offsets(const Longs& offsets, py::ssize_t n) {
  const int64_t* const o = offsets.data();
  const py::ssize_t m = offsets.size();
  bool good = m > 0 && o[0] == 0 && o[m - 1] <= n;
  for (py::ssize_t i = 1; good && i < m; ++i) good = o[i] >= o[i - 1];
  if (!good) throw py::value_error("offsets do not fit their values");
}

// SipHash-2-4 (Aumasson and Bernstein, 2012).
uint64_t siphash(const uint8_t* data, size_t n, uint64_t k0, uint64_t k1) {
  const auto rotate = [](uint64_t x, int b) { return (x << b) | (x >> (64 - b)); };
  uint64_t v0 = k0 ^ 0x736f6d6570736575ULL, v1 = k1 ^ 0x646f72616e646f6dULL, v2 = k0 ^ 0x6c7967656e657261ULL,
           v3 = k1 ^ 0x7465646279746573ULL;
  const auto round = [&] {
    v0 += v1; v1 = rotate(v1, 13); v1 ^= v0; v0 = rotate(v0, 32);
    v2 += v3; v3 = rotate(v3, 16); v3 ^= v2;
    v0 += v3; v3 = rotate(v3, 21); v3 ^= v0;
    v2 += v1; v1 = rotate(v1, 17); v1 ^= v2; v2 = rotate(v2, 32);
  };
  const auto word = [&](size_t at, size_t size) {
    uint64_t w = 0;
    for (size_t k = 0; k < size; ++k) w |= static_cast<uint64_t>(data[at + k]) << (8 * k);
    return w;
  };
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint64_t m = word(i, 8);
    v3 ^= m; round(); round(); v0 ^= m;
  }
  const uint64_t m = word(i, n - i) | (static_cast<uint64_t>(n) << 56);
  v3 ^= m; round(); round(); v0 ^= m;
  v2 ^= 0xff;
  round(); round(); round(); round();
  return v0 ^ v1 ^ v2 ^ v3;
}

py::array_t<uint64_t> hash_texts(const Bytes& texts, const Longs& offsets, uint64_t k0, uint64_t k1) {
  check_offsets(offsets, texts.size());
  const py::ssize_t n = offsets.size() - 1;
  py::array_t<uint64_t> out(n);
  uint64_t* const to = out.mutable_data();
  const uint8_t* const data = texts.data();
  const int64_t* const o = offsets.data();
  py::gil_scoped_release released;
  for (py::ssize_t i = 0; i < n; ++i) to[i] = siphash(data + o[i], static_cast<size_t>(o[i + 1] - o[i]), k0, k1);
  return out;
}

// Stretches of a packed array in another order.
template <typename T>
py::tuple gather(const py::array_t<T, py::array::c_style>& values, const Longs& offsets, const Longs& order) {
  check_offsets(offsets, values.size());
  const py::ssize_t m = order.size(), n = offsets.size() - 1;
  const int64_t *const o = offsets.data(), *const chosen = order.data();
  Longs out_offsets(m + 1);
  int64_t* const to = out_offsets.mutable_data();
  to[0] = 0;
  for (py::ssize_t i = 0; i < m; ++i) {
    if (chosen[i] < 0 || chosen[i] >= n) throw py::index_error("no such record");
    to[i + 1] = to[i] + o[chosen[i] + 1] - o[chosen[i]];
  }
  py::array_t<T> out(to[m]);
  T* const target = out.mutable_data();
  const T* const source = values.data();
  {
    py::gil_scoped_release released;
    for (py::ssize_t i = 0; i < m; ++i) {
      const size_t size = static_cast<size_t>(to[i + 1] - to[i]) * sizeof(T);
      if (size) std::memcpy(target + to[i], source + o[chosen[i]], size);
    }
  }
  return py::make_tuple(std::move(out), std::move(out_offsets));
}

// The terms of records, gathered from rows of GO numbers, with all their ancestors: ascending, each once.
//
// Row r belongs to record record_of[r], ascending, or to none (-1). index_of_number gives the term of a number, or less
// than 0; ancestors[t] holds t. Returns terms and offsets per record, how many different terms the records had before,
// how many numbers were another name of their term, and the numbers that are no term.
py::tuple close_terms(const Ints& numbers, const Longs& offsets, const Longs& record_of, int64_t n_records,
                      const Ints& index_of_number, const Longs& number_of_term, const Ints& ancestors,
                      const Longs& ancestor_offsets) {
  check_offsets(offsets, numbers.size());
  check_offsets(ancestor_offsets, ancestors.size());
  const py::ssize_t n_rows = offsets.size() - 1;
  const auto n_terms = static_cast<int32_t>(ancestor_offsets.size() - 1);
  const int32_t *const number = numbers.data(), *const table = index_of_number.data(), *const above = ancestors.data();
  const int64_t *const o = offsets.data(), *const record = record_of.data(), *const ao = ancestor_offsets.data(),
                *const own_number = number_of_term.data();
  bool good = record_of.size() == n_rows && number_of_term.size() == n_terms;
  int64_t latest = -1;
  for (py::ssize_t r = 0; good && r < n_rows; ++r) {
    if (record[r] < 0) continue;
    good = record[r] >= latest && record[r] < n_records;
    latest = record[r];
  }
  for (py::ssize_t i = 0; good && i < ancestors.size(); ++i) good = above[i] >= 0 && above[i] < n_terms;
  if (!good) throw py::value_error("rows, records, terms and ancestors do not fit together");

  std::vector<int32_t> out, lost;
  std::vector<int64_t> out_offsets{0};
  int64_t own = 0, renamed = 0;
  {
    py::gil_scoped_release released;
    out_offsets.reserve(static_cast<size_t>(n_records) + 1);
    std::vector<uint64_t> has((static_cast<size_t>(n_terms) + 63) / 64, 0);  // a bit for each term
    std::vector<int32_t> mine;
    const auto finish = [&] {
      std::sort(mine.begin(), mine.end());
      mine.erase(std::unique(mine.begin(), mine.end()), mine.end());
      own += static_cast<int64_t>(mine.size());
      size_t low = has.size(), high = 0;
      for (const int32_t term : mine) {
        for (int64_t k = ao[term]; k < ao[term + 1]; ++k) {
          const auto word = static_cast<size_t>(above[k]) / 64;
          has[word] |= uint64_t{1} << (above[k] % 64);
          low = std::min(low, word);
          high = std::max(high, word + 1);
        }
      }
      mine.clear();
      for (size_t word = low; word < high; ++word) {
        for (uint64_t bits = std::exchange(has[word], 0); bits; bits &= bits - 1)
          out.push_back(static_cast<int32_t>(64 * word) + __builtin_ctzll(bits));
      }
      out_offsets.push_back(static_cast<int64_t>(out.size()));
    };
    for (py::ssize_t r = 0; r < n_rows; ++r) {
      if (record[r] < 0) continue;
      while (static_cast<int64_t>(out_offsets.size()) - 1 < record[r]) finish();
      for (int64_t k = o[r]; k < o[r + 1]; ++k) {
        const int32_t found = number[k] >= 0 && number[k] < index_of_number.size() ? table[number[k]] : -1;
        if (found < 0 || found >= n_terms) {
          lost.push_back(number[k]);
          continue;
        }
        renamed += own_number[found] != number[k];
        mine.push_back(found);
      }
    }
    while (static_cast<int64_t>(out_offsets.size()) - 1 < n_records) finish();
  }
  return py::make_tuple(to_numpy(std::move(out)), to_numpy(std::move(out_offsets)), own, renamed,
                        to_numpy(std::move(lost)));
}

}  // namespace

PYBIND11_MODULE(_records, m) {
  py::class_<RecordReader>(m, "RecordReader")
      .def(py::init<const std::string&, std::string, const py::bytes&>(), py::arg("format"), py::arg("name"),
           py::arg("tokens"))
      .def("feed", &RecordReader::feed, py::arg("piece"), py::arg("last"));
  m.def("hash_texts", &hash_texts, py::arg("texts"), py::arg("offsets"), py::arg("k0"), py::arg("k1"));
  m.def("gather_bytes", &gather<uint8_t>, py::arg("values"), py::arg("offsets"), py::arg("order"));
  m.def("gather_ints", &gather<int32_t>, py::arg("values"), py::arg("offsets"), py::arg("order"));
  m.def("close_terms", &close_terms, py::arg("numbers"), py::arg("offsets"), py::arg("record_of"),
        py::arg("n_records"), py::arg("index_of_number"), py::arg("number_of_term"), py::arg("ancestors"),
        py::arg("ancestor_offsets"));
}
