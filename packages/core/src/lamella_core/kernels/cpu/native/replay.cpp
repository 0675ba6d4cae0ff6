// Replays a recorded list of kernel calls: what lies between two kernels of a decoding step is then a switch, not an
// interpreter. The caller keeps every buffer alive that the calls name.
#include <type_traits>
#include <utility>

#include "calls.h"

using namespace lamella;

namespace lamella {
namespace {

using Word = std::uint64_t;  // one argument: a pointer, an integer, or the bits of a float in its low half

template <typename A>
A argument(Word word) {
  if constexpr (std::is_pointer_v<A>) {
    return reinterpret_cast<A>(word);
  } else if constexpr (std::is_floating_point_v<A>) {
    const std::uint32_t bits = static_cast<std::uint32_t>(word);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return static_cast<A>(word);
  }
}

template <typename... A, std::size_t... I>
std::int32_t call(std::int32_t (*function)(A...), const Word* words, std::index_sequence<I...>) {
  return function(argument<A>(words[I])...);
}

template <typename... A>
std::int32_t call(std::int32_t (*function)(A...), const Word* words) {
  return call(function, words, std::index_sequence_for<A...>{});
}

// The codes are indices into RECORDABLE of abi.py.
std::int32_t dispatch(Word code, const Word* words) {
  switch (code) {
    case 0: return call(lamella_matmul_panels, words);
    case 1: return call(lamella_gemv_rows, words);
    case 2: return call(lamella_rms_norm, words);
    case 3: return call(lamella_silu_and_mul, words);
    case 4: return call(lamella_rope, words);
    case 5: return call(lamella_write_kv, words);
    case 6: return call(lamella_paged_attention, words);
  }
  return kBadShape;
}

}  // namespace
}  // namespace lamella

// calls [count][1 + width]: the code of a kernel, then its arguments. Stops at the first call that fails, whose index
// goes to *failed.
LAMELLA_API std::int32_t lamella_replay(const std::uint64_t* calls, i64 count, i64 width, i64* failed) {
  for (i64 i = 0; i < count; ++i) {
    const std::uint64_t* words = calls + i * (1 + width);
    const std::int32_t status = dispatch(words[0], words + 1);
    if (status != kOk) {
      *failed = i;
      return status;
    }
  }
  return kOk;
}
