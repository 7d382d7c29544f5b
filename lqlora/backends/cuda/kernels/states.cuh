// States of trellis codes. The codes of a sequence are a circular stream of bits, `bits` for each weight. The state of a
// weight is the window of `state_bits` bits, at most 16, that ends with its code.

constexpr int SEQUENCE = 256;  // most weights of a sequence; longer blocks are cut

// How lines of weights are cut into blocks, and blocks into sequences.
struct Trellis {
  Blocks lines, blocks;        // weights of a line, and of a block
  long long blocks_per_line;
  int bits, state_bits;
};

// A weight in its sequence.
struct InSequence {
  long long start, block;  // first weight of the sequence, and the block that it lies in
  int at, size;            // place of the weight, and weights of the sequence
};

__device__ __forceinline__ InSequence sequence_of(long long weight, const Trellis& trellis) {
  const Position line = position_of(weight, trellis.lines), block = position_of(line.within, trellis.blocks);
  const long long rest = trellis.lines.size - block.block * trellis.blocks.size;  // a line may end in a short block
  const long long end = rest < trellis.blocks.size ? rest : trellis.blocks.size, first = block.within / SEQUENCE * SEQUENCE;
  const long long size = end - first < SEQUENCE ? end - first : SEQUENCE;
  return {weight - (block.within - first), line.block * trellis.blocks_per_line + block.block, (int)(block.within - first),
          (int)size};
}

// `count` bits, 1 to 16, from the bit `first` of the packed codes on. No byte behind the last bit is read.
__device__ __forceinline__ unsigned bits_at(const unsigned char* __restrict__ packed, long long first, int count) {
  const unsigned char* from = packed + first / 8;
  const int shift = (int)(first % 8);
  unsigned word = from[0];
  if (shift + count > 8) word |= (unsigned)from[1] << 8;
  if (shift + count > 16) word |= (unsigned)from[2] << 16;
  return word >> shift & ((1u << count) - 1);
}

__device__ __forceinline__ unsigned state_of(const unsigned char* __restrict__ packed, const InSequence& place,
                                             const Trellis& trellis) {
  const long long start = place.start * trellis.bits;
  const int count = trellis.state_bits, begin = (place.at + 1) * trellis.bits - count;
  if (begin >= 0) return bits_at(packed, start + begin, count);
  // The window begins in the last codes of the sequence.
  const int length = place.size * trellis.bits;
  if (length >= count) return bits_at(packed, start + length + begin, -begin) | bits_at(packed, start, count + begin) << -begin;
  // The circle is shorter than the window. Bits are read from the newest one back.
  unsigned state = 0;
  int bit = (place.at + 1) * trellis.bits;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (bit == 0) bit = length;
    state = state << 1 | bits_at(packed, start + --bit, 1);
  }
  return state;
}
