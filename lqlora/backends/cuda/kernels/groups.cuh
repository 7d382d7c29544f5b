// Codes in groups of eight: eight codes of `bits` bits fill `bits` whole bytes, whatever `bits` is, so that a thread
// with a group shares no byte with another thread. Within a group, code i begins at bit i * bits of a little-endian
// number.

constexpr int GROUP = 8;

template <int bytes> struct Word;
template <> struct Word<1> { using type = unsigned char; };
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = unsigned long long; };

// The largest power of two that divides the bytes of a group: the words that it is read and written by.
template <int bits> constexpr int word_bytes = bits & -bits;

template <int bytes> __device__ __forceinline__ unsigned long long load_words(const unsigned char* from, int count) {
  const auto* words = reinterpret_cast<const typename Word<bytes>::type*>(from);
  unsigned long long group = 0;
#pragma unroll
  for (int i = 0; i < 8 / bytes; ++i)
    if (i < count) group |= (unsigned long long)words[i] << 8 * bytes * i;
  return group;
}

template <int bytes>
__device__ __forceinline__ void store_words(unsigned char* to, int count, unsigned long long group) {
  auto* words = reinterpret_cast<typename Word<bytes>::type*>(to);
#pragma unroll
  for (int i = 0; i < 8 / bytes; ++i)
    if (i < count) words[i] = (typename Word<bytes>::type)(group >> 8 * bytes * i);
}

// The group of `count` codes that begins at `from`: a last group may hold fewer than eight.
template <int bits>
__device__ __forceinline__ unsigned long long load_group(const unsigned char* from, bool aligned, int count) {
  constexpr int bytes = word_bytes<bits>;
  if (aligned && count == GROUP) return load_words<bytes>(from, bits / bytes);
  return load_words<1>(from, (count * bits + 7) / 8);
}

template <int bits>
__device__ __forceinline__ void store_group(unsigned char* to, bool aligned, int count, unsigned long long group) {
  constexpr int bytes = word_bytes<bits>;
  if (aligned && count == GROUP) return store_words<bytes>(to, bits / bytes, group);
  store_words<1>(to, (count * bits + 7) / 8, group);
}

template <int bits> __device__ __forceinline__ int code_in(unsigned long long group, int i) {
  return (int)(group >> bits * i) & ((1 << bits) - 1);
}

__device__ __forceinline__ int group_length(long long first, long long count) {
  return count - first < GROUP ? (int)(count - first) : GROUP;
}

// Blocks of scales: their length, and its reciprocal, rounded.
struct Blocks {
  long long size;
  double inverse;
};

// Where a weight is among blocks.
struct Position {
  long long block, within;
};

// Returns the block of a weight and the position within it. A division of 64-bit integers is a function call on a
// device, around which registers are spilled, so it is avoided. Numbers of 32 bits are divided directly. Larger ones
// are multiplied by the rounded reciprocal: both roundings have a relative error of at most 2**-53, so for a quotient
// below 2**52 the estimate is off by less than one, and its integer part by one at most. The remainder shows in which
// direction.
__device__ __forceinline__ Position position_of(long long weight, Blocks blocks) {
  if (!((unsigned long long)(weight | blocks.size) >> 32)) {
    const unsigned block = (unsigned)weight / (unsigned)blocks.size;
    return {block, (unsigned)weight - block * (unsigned)blocks.size};
  }
  long long block = (long long)((double)weight * blocks.inverse), within = weight - block * blocks.size;
  if (within < 0) --block, within += blocks.size;
  if (within >= blocks.size) ++block, within -= blocks.size;
  return {block, within};
}

// The block of the current weight, while a thread goes through the weights of a group. It counts and does not divide.
struct BlockWalk {
  long long block, size;
  int next;  // the weight of the group that begins the next block

  __device__ __forceinline__ BlockWalk(Position first, long long block_size)
      : block(first.block), size(block_size), next(clipped(block_size - first.within)) {}

  static __device__ __forceinline__ int clipped(long long weights) { return weights < GROUP ? (int)weights : GROUP; }

  // True if weight i is the first of another block than the weight before.
  __device__ __forceinline__ bool enters(int i) {
    if (i != next) return false;
    ++block;
    next = i + clipped(size);
    return true;
  }
};

__device__ __forceinline__ long long first_thread() { return blockIdx.x * (long long)blockDim.x + threadIdx.x; }
__device__ __forceinline__ long long thread_count() { return gridDim.x * (long long)blockDim.x; }

// Copies a table to shared memory: every weight looks into it, and shared memory is faster than global memory.
template <int length> __device__ __forceinline__ void share(const float* __restrict__ from, float (&to)[length]) {
  for (int i = threadIdx.x; i < length; i += blockDim.x) to[i] = from[i];
  __syncthreads();
}

// Position of a boundary in shared memory. Many boundaries have a gap of one word after every 32. The first steps of a
// binary search read boundaries that are multiples of 32 apart. Without gaps these are in one of the 32 banks of shared
// memory, and threads that read different ones would wait for each other.
template <bool gaps> __device__ constexpr int place_of(int boundary) { return gaps ? boundary + boundary / 32 : boundary; }

constexpr int MANY = 128;

template <bool gaps> __device__ __forceinline__ void share_boundaries(const float* __restrict__ from, int cells, float* to) {
  for (int i = threadIdx.x; i < cells - 1; i += blockDim.x) to[place_of<gaps>(i)] = from[i];
  __syncthreads();
}

// Returns the number of boundaries strictly below a value. Steps and cells are powers of two. The search runs on
// positions with gaps: 32 boundaries take 33 words, so at the end place / 33 gaps are subtracted.
template <bool gaps, class Real>
__device__ __forceinline__ int cell_of(Real value, const float* boundaries, int cells) {
  int place = 0;
  for (int step = cells / 2; step > 0; step /= 2)
    if (value > boundaries[place + place_of<gaps>(step - 1)]) place += place_of<gaps>(step);
  return gaps ? place - place / 33 : place;
}

// Decodes a group of `length` codes: (level - zero point) * scale in float32, as the reference rounds it.
template <int bits>
__device__ __forceinline__ void decode_group(unsigned long long group, Position first, int length,
                                             const float* __restrict__ scales,
                                             const unsigned char* __restrict__ zero_points, bool affine,
                                             const float* table, long long block_size, float (&weights)[GROUP]) {
  BlockWalk walk(first, block_size);
  float scale = scales[walk.block], zero = affine ? zero_points[walk.block] : 0;
#pragma unroll
  for (int i = 0; i < GROUP; ++i) {
    if (i < length && walk.enters(i)) scale = scales[walk.block], zero = affine ? zero_points[walk.block] : 0;
    weights[i] = (table[code_in<bits>(group, i)] - zero) * scale;
  }
}

// The codes and blocks of one row. Rows and blocks are shorter than 2**31.
struct RowOfWeights {
  const unsigned char* codes;
  const float* scales;                 // of the block that the row begins in
  const unsigned char* zero_points;
  unsigned within, size;               // weights of that block before the row, and in all
  int shift;                           // of sizes that are powers of two, or -1

  __device__ __forceinline__ Position at(unsigned column) const {
    const unsigned ahead = within + column;
    const unsigned blocks = shift >= 0 ? ahead >> shift : ahead / size;
    return {blocks, ahead - blocks * size};
  }
};
