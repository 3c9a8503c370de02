// From a token's bytes in any format to floats, for one instruction set, as cpu/each_isa.h says.

namespace flashmla::cpu::FLASHMLA_ISA {

constexpr int kLanes = FLASHMLA_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

constexpr int kCacheLine = 64;  // bytes

template <class Vector, class T>
FLASHMLA_TARGET inline Vector load(const T* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector, class T>
FLASHMLA_TARGET inline void store(T* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

FLASHMLA_TARGET inline Floats to_float(Halves from, BFloat16) {
  return (Floats)(__builtin_convertvector(from, Words) << 16);
}

FLASHMLA_TARGET inline Floats to_float(Halves from, Float16) {  // as Float16::to_float
  const Words bits = __builtin_convertvector(from, Words);
  const Words sign = (bits & 0x8000u) << 16;
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words denormal = (Words)((Floats)(magnitude + 0x38800000u) - 0x1p-14f);
  Words result = magnitude + 0x38000000u;
  result = magnitude < 0x00800000u ? denormal : result;
  result = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : result;
  return (Floats)(sign | result);
}

template <class Element>
FLASHMLA_TARGET inline Floats load_floats(const Element* from) {
  return to_float(load<Halves>(from), Element{});
}

FLASHMLA_TARGET inline Floats load_floats(const Float32* from) { return load<Floats>(from); }

template <class Element>
FLASHMLA_TARGET void convert(const Element* from, int n, float* to) {
  int k = 0;
  for (; k + kLanes <= n; k += kLanes) store(to + k, load_floats(from + k));
  for (; k < n; ++k) to[k] = Element::to_float(from[k]);
}

FLASHMLA_TARGET inline Floats e4m3_to_floats(Bytes from) {  // as e4m3_to_float
  const Words bits = __builtin_convertvector(from, Words);
  const Words sign = (bits & 0x80u) << 24;
  const Words magnitude = (bits & 0x7fu) << 20;
  const Words denormal = (Words)((Floats)(magnitude + 0x3c800000u) - 0x1p-6f);
  Words result = magnitude + 0x3c000000u;
  result = magnitude < 0x00800000u ? denormal : result;
  result = magnitude == 0x07f00000u ? magnitude | 0x7fc00000u : result;
  return (Floats)(sign | result);
}

template <class Element>
FLASHMLA_TARGET void load_dense(const Row& row, int d_qk, float* to) {
  convert(reinterpret_cast<const Element*>(row.plane[0]), d_qk, to);
}

// Rounds n values to the type that they have in a 16-bit cache.
template <class Element>
FLASHMLA_TARGET inline void round_to(float* values, int n) {
  for (int k = 0; k < n; ++k) values[k] = Element::to_float(Element::from_float(values[k]));
}

// Whether every code times the scale is a value of the type: then nothing is rounded.
template <class Element>
FLASHMLA_TARGET inline bool is_exact(float scale) {
  const uint32_t bits = bits_of_float(scale);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const bool is_half = std::is_same_v<Element, Float16>;
  return (bits & 0x7fffff) == 0 && exponent >= (is_half ? -15 : -100) &&
         exponent <= (is_half ? 7 : 100);
}

template <ScaleType kType>
FLASHMLA_TARGET inline float load_scale(const uint8_t* scales, int group) {
  if constexpr (kType == ScaleType::kFloat32) {
    float scale;
    std::memcpy(&scale, scales + 4 * group, 4);
    return scale;
  } else if constexpr (kType == ScaleType::kE8M0) {
    const uint32_t byte = scales[group];
    return float_of_bits(byte == 0 ? 0x00400000 : byte == 255 ? 0x7fc00000 : byte << 23);
  } else if constexpr (kType == ScaleType::kE4M3) {
    return e4m3_to_float(scales[group]);
  } else {
    return 1.0f;  // the caller's
  }
}

template <ScaleType kType>
FLASHMLA_TARGET inline void load_codes(const uint8_t* codes, int n, float scale, float* to) {
  if constexpr (kType == ScaleType::kE4M3) {
    for (int k = 0; k < n; k += 2) {
      to[k] = e2m1_to_float(codes[k / 2]) * scale;
      to[k + 1] = e2m1_to_float(codes[k / 2] >> 4) * scale;
    }
  } else {
    for (int k = 0; k < n; k += kLanes) {
      store(to + k, e4m3_to_floats(load<Bytes>(codes + k)) * scale);
    }
  }
}

template <Format kFormat, class Element>
FLASHMLA_TARGET void load_coded(const Row& row, int, float* to) {
  constexpr FormatLayout kLayout = layout_of(kFormat);
  constexpr int kCodesPerByte = kLayout.scale == ScaleType::kE4M3 ? 2 : 1;
  const uint8_t* scales = row.plane[kLayout.scale_plane] + kLayout.scale_offset;
  for (int k = 0; k < kLayout.codes; k += kLayout.group) {
    const float scale = load_scale<kLayout.scale>(scales, k / kLayout.group);
    load_codes<kLayout.scale>(row.plane[0] + k / kCodesPerByte, kLayout.group, scale, to + k);
    if (!is_exact<Element>(scale)) round_to<Element>(to + k, kLayout.group);
  }
  constexpr int kRope = kLayout.d_qk - kLayout.codes;
  if constexpr (kRope > 0) {
    float* rope = to + kLayout.codes;
    convert(reinterpret_cast<const BFloat16*>(row.plane[0] + kLayout.rope_offset), kRope, rope);
    if constexpr (std::is_same_v<Element, Float16>) round_to<Element>(rope, kRope);
  }
}

// How rows of a format are read.
struct RowLoader {
  void (*load)(const Row& row, int d_qk, float* to);
  int bytes[2];  // of a token in each plane

  FLASHMLA_TARGET void prefetch(const Row& row) const {
    if (row.plane[0] == nullptr) return;
    for (int k = 0; k < bytes[0]; k += kCacheLine) __builtin_prefetch(row.plane[0] + k);
    if (bytes[1] > 0) __builtin_prefetch(row.plane[1]);
  }
};

template <class Element>
FLASHMLA_TARGET RowLoader find_loader_of(const RowFormat& rows) {
  const FormatLayout layout = layout_of(rows.format);
  const auto coded = [&](auto load) {
    return RowLoader{load, {layout.plane_bytes[0], layout.plane_bytes[1]}};
  };
  switch (rows.format) {
    case Format::kV32:
      return coded(load_coded<Format::kV32, Element>);
    case Format::kV32Nope:
      return coded(load_coded<Format::kV32Nope, Element>);
    case Format::kV4:
      return coded(load_coded<Format::kV4, Element>);
    case Format::kV41:
      return coded(load_coded<Format::kV41, Element>);
    case Format::kV41Fp4:
      return coded(load_coded<Format::kV41Fp4, Element>);
    case Format::kFp8Row:
      return coded(load_coded<Format::kFp8Row, Element>);
    case Format::kFp8Index:
      return coded(load_coded<Format::kFp8Index, Element>);
    case Format::kDense:
      break;
  }
  return {load_dense<Element>, {rows.d_qk * static_cast<int>(sizeof(Element)), 0}};
}

FLASHMLA_TARGET inline RowLoader find_loader(const RowFormat& rows) {
  switch (rows.dtype) {  // with_element's lambda would be outside the target attribute
    case DType::kBFloat16:
      return find_loader_of<BFloat16>(rows);
    case DType::kFloat16:
      return find_loader_of<Float16>(rows);
    case DType::kFloat32:
      break;
  }
  return find_loader_of<Float32>(rows);
}

}  // namespace flashmla::cpu::FLASHMLA_ISA
