// Half-precision numbers to and from A: a part of kernels_impl.h, inside its namespace and with its macros. Bit by bit, in
// loops that every compiler turns into vectors; rounding is to nearest, ties to even.

FN float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

FN uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// A half's exponent and mantissa, moved to a float's place, are 2^112 too small; infinity and NaN keep all ones.
FN float from_half(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = (h & 0x8000u) << 16;
  const uint32_t finite = as_bits(as_float(magnitude << 13) * as_float(0x77800000u));
  return as_float((magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : finite) | sign);
}

// Adding 0.5 (whose last bit is a half's smallest step) rounds what will be a subnormal half; other values get half a
// step added, and one less unless the kept mantissa is odd.
FN uint16_t to_half(float x) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const uint32_t tiny = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  return static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | sign);
}

FN uint16_t to_bfloat(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

template <class A>
ENTRY void widen_half(const uint16_t* in, A* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_half(in[i]);
}

template <class A>
ENTRY void widen_bfloat(const uint16_t* in, A* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = as_float(static_cast<uint32_t>(in[i]) << 16);
}

template <class A>
ENTRY void narrow_half(const A* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_half(static_cast<float>(in[i]));
}

template <class A>
ENTRY void narrow_bfloat(const A* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat(static_cast<float>(in[i]));
}
