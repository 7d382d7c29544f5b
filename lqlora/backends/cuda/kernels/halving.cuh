// Sums of rows in the order that lqlora.ops.row_sums defines: a row is halved until one term is left. Each halving adds
// term i + half to term i; if the number of terms is odd, the last term is kept unchanged.
//
// The additions form a binary tree whose root is the sum, and a path of bits leads from the root to each term. The
// lowest bits of the path number the thread, the next ones a slot of that thread. So a thread adds its slots first,
// without exchanging anything, and then the threads of a team add in the order of the last halvings. A term that is
// kept unchanged has only one child, so some paths lead to no term. Their slots hold -0, which changes no number that
// it is added to, not even -0.

// Returns the term, among `length`, at the end of a path of `levels` bits, or -1. The path starts at term `at` of those
// that `levels` halvings leave. After `level` halvings there are ceil(length / 2**level) terms: each halving rounds up.
template <class Index> __device__ __forceinline__ Index leaf(Index at, int path, int levels, Index length) {
  for (int level = levels - 1; level >= 0; --level, path >>= 1) {
    const Index half = (length + ((Index)1 << level) - 1 >> level) / 2;
    if (at < half) at += path & 1 ? half : 0;
    else if (path & 1) return -1;
    else at = 2 * half;
  }
  return at;
}

// Returns the sum of the terms in the slots of a thread, halved in the same order.
template <int count, class Value, int slots> __device__ __forceinline__ Value halved(Value (&terms)[slots]) {
  if constexpr (count > 1) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) terms[i] = terms[i] + terms[i + count / 2];
    return halved<count / 2>(terms);
  }
  return terms[0];
}

// Entries of a row in the registers of a thread, and threads of a block, which may all share one row. fits.py has the
// same numbers: 8 * 512 = 4096 entries are the longest row that a block can sum at once.
constexpr int SLOTS = 8, TEAM = 512;

// Threads that share a row; their number is a power of two. All teams of a block call `sum` equally often, because it
// waits at barriers of the whole block.
template <class Value> struct Team {
  int lanes;
  Value* met;  // of shared memory, one for each thread of the block

  __device__ __forceinline__ int lane() const { return threadIdx.x & lanes - 1; }

  // Writes the indices of this thread's entries in rows of some length; -1 for none.
  __device__ __forceinline__ void find(int length, int (&entries)[SLOTS]) const {
    const bool whole = length == lanes * SLOTS;
    int levels = 0;
    while (1 << levels < lanes * SLOTS) ++levels;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
      entries[i] = whole ? lane() + i * lanes : leaf(0, lane() + i * lanes, levels, length);
  }

  // Returns the sum of all terms of the team, to every thread. Teams of several warps first add the terms of equal
  // lanes through shared memory, in the order of the tree; then a warp adds by shuffles. The second barrier keeps fast
  // threads from overwriting what slow ones still read.
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
