// Sums of rows in the order that lqlora.ops.row_sums defines: a row is halved again and again, term i meets term i + half,
// and the last of an odd number goes on alone.
//
// So a row is a tree, whose root is what is left at last, and every term is at the end of one path from there. Bits of the
// path are those of a thread, the lowest first, then those of one of its slots. Paths that lead nowhere, since a term went
// on alone, have the term -0: added to any number it changes nothing.

// Which of `length` terms a path of `levels` bits leads to, from number `at` of what as many halvings leave; -1 for none.
template <class Index> __device__ __forceinline__ Index leaf(Index at, int path, int levels, Index length) {
  for (int level = levels - 1; level >= 0; --level, path >>= 1) {
    const Index half = (length + ((Index)1 << level) - 1 >> level) / 2;
    if (at < half) at += path & 1 ? half : 0;
    else if (path & 1) return -1;
    else at = 2 * half;
  }
  return at;
}

// The sum of terms that lie as slots do: the lowest bits of their paths are the last.
template <int count, class Value, int slots> __device__ __forceinline__ Value halved(Value (&terms)[slots]) {
  if constexpr (count > 1) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) terms[i] = terms[i] + terms[i + count / 2];
    return halved<count / 2>(terms);
  }
  return terms[0];
}

// Entries of a row that a thread has, and threads of a block, all of which may have one row together.
constexpr int SLOTS = 8, TEAM = 512;

// Threads that have a row together: a power of two of them. All teams of a block add up as often.
template <class Value> struct Team {
  int lanes;
  Value* met;  // of shared memory, one for each thread of the block

  __device__ __forceinline__ int lane() const { return threadIdx.x & lanes - 1; }

  // Which entries of rows of some length are this thread's, -1 for none.
  __device__ __forceinline__ void find(int length, int (&entries)[SLOTS]) const {
    const bool whole = length == lanes * SLOTS;
    int levels = 0;
    while (1 << levels < lanes * SLOTS) ++levels;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
      entries[i] = whole ? lane() + i * lanes : leaf(0, lane() + i * lanes, levels, length);
  }

  // The sum of all terms of the team, which every thread gets.
  __device__ __forceinline__ Value sum(Value (&terms)[SLOTS]) const {
    Value own = halved<SLOTS>(terms);
    if (lanes > 32) {
      met[threadIdx.x] = own;
      __syncthreads();
      Value others[TEAM / 32];
#pragma unroll
      for (int i = 0; i < TEAM / 32; ++i)
        others[i] = 32 * i < lanes ? met[threadIdx.x - lane() + threadIdx.x % 32 + 32 * i] : (Value)-0.0;
      own = halved<TEAM / 32>(others);
      __syncthreads();
    }
    for (int distance = lanes < 32 ? lanes / 2 : 16; distance > 0; distance /= 2)
      own = own + __shfl_xor_sync(0xffffffffu, own, distance);
    return own;
  }
};
