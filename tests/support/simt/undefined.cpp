// The callbacks of -fsanitize=undefined. Compared with the compiler's own runtime, they name the thread, stop its launch alone, and
// report a place as often as it is met.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "simt_internal.h"

namespace {

// Laid out as the compiler does: the head of what it passes first, and a type.
struct Place {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[];
};
struct Mismatch {
  Place place;
  const Type* type;
  uint8_t log_alignment, access;
};

[[noreturn]] void report(const void* data, const void* site, const std::string& why) {
  if (simt::in_kernel()) simt::stop_launch("undefined behaviour: " + why, site);
  const auto place = static_cast<const Place*>(data);
  fprintf(stderr, "simt: undefined behaviour on the host, at %s:%u: %s\n", place->file, place->line, why.c_str());
  abort();
}

}  // namespace

#define SIMT_UNDEFINED(name, why, ...) \
  extern "C" void __ubsan_handle_##name(const void* data, ##__VA_ARGS__) { report(data, __builtin_return_address(0), why); }
SIMT_UNDEFINED(add_overflow, "signed integer overflow of +", uintptr_t, uintptr_t)
SIMT_UNDEFINED(sub_overflow, "signed integer overflow of -", uintptr_t, uintptr_t)
SIMT_UNDEFINED(mul_overflow, "signed integer overflow of *", uintptr_t, uintptr_t)
SIMT_UNDEFINED(negate_overflow, "signed integer overflow of a negation", uintptr_t)
SIMT_UNDEFINED(divrem_overflow, "division by zero, or of the smallest integer by -1", uintptr_t, uintptr_t)
SIMT_UNDEFINED(shift_out_of_bounds, "shift by a negative number or beyond the type's width", uintptr_t, uintptr_t)
SIMT_UNDEFINED(load_invalid_value, "load of a value that its type does not have", uintptr_t)
SIMT_UNDEFINED(vla_bound_not_positive, "array of no or negative length", uintptr_t)
SIMT_UNDEFINED(pointer_overflow, "pointer arithmetic that wraps around", uintptr_t, uintptr_t)
SIMT_UNDEFINED(invalid_builtin, "argument 0 to a builtin that does not take it")
SIMT_UNDEFINED(nonnull_arg, "null pointer as an argument that must not be null")
SIMT_UNDEFINED(nonnull_return_v1, "null pointer as a result that must not be null", const void*)
SIMT_UNDEFINED(builtin_unreachable, "execution of what was declared unreachable")
SIMT_UNDEFINED(missing_return, "end of a function that must return a value")
#undef SIMT_UNDEFINED

extern "C" void __ubsan_handle_out_of_bounds(const void* data, uintptr_t index) {
  report(data, __builtin_return_address(0), simt::text("array index %lld is out of bounds", static_cast<long long>(index)));
}

extern "C" void __ubsan_handle_type_mismatch_v1(const Mismatch* data, uintptr_t address) {
  const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  std::string why = "access through a null pointer";
  if (address != 0) why = address % alignment ? "misaligned address" : "address without room";
  why += simt::text(": 0x%llx, for an object of type %s, %llu-byte aligned", static_cast<unsigned long long>(address), data->type->name,
                    static_cast<unsigned long long>(alignment));
  report(data, __builtin_return_address(0), why);
}
