// The checks that g++ -fsanitize=bounds,alignment inserts into kernels: array indices, and alignment of vector accesses.
#include "cuda/emulated/state.h"

namespace {

using fastmaml::emu::block;
using fastmaml::emu::fail;

// The compiler's own tables, as far as needed.
struct Source {
  const char* file;
  uint32_t line, column;

  std::string text() const { return std::string(file).substr(std::string(file).rfind('/') + 1) + ":" + std::to_string(line); }
};
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Index {
  Source source;
  const Type *array, *index;
};
struct Mismatch {
  Source source;
  const Type* type;
  unsigned char log2_alignment, kind;
};

}  // namespace

extern "C" {
void __ubsan_handle_out_of_bounds(Index* of, uintptr_t index) {
  if (!block.running) return;
  fail("out of bounds: index " + std::to_string(int64_t(index)) + " of an array of type " + of->array->name + " at " + of->source.text());
}
void __ubsan_handle_type_mismatch_v1(Mismatch* of, uintptr_t) {
  if (!block.running) return;
  fail(std::string("misaligned access: type ") + of->type->name + " needs " + std::to_string(1 << of->log2_alignment) +
       " bytes alignment at " + of->source.text());
}
}
