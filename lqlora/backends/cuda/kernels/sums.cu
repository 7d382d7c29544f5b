// Sums with the same bytes for any order of the threads. Sums of rows have a fixed order of additions. Sums of bins
// round the terms to multiples of a unit, and add integers.

// ---- Rows

// Runs four halvings at once: each thread adds the sixteen terms that they reduce to one. Rows of `length` become rows
// of `left` terms.
template <class Value>
__global__ void __launch_bounds__(256)
    halve_rows(const Value* __restrict__ rows, Value* __restrict__ shorter, long long count, long long length,
               long long left, double inverse) {
  constexpr int slots = 16, levels = 4;
  const bool whole = length == slots * left;
  for (long long i = first_thread(); i < count * left; i += thread_count()) {
    const Position place = position_of(i, {left, inverse});
    Value terms[slots];
#pragma unroll
    for (int k = 0; k < slots; ++k) {
      const long long at = whole ? place.within + k * left : leaf(place.within, k, levels, length);
      terms[k] = at < 0 ? (Value)-0.0 : rows[place.block * length + at];
    }
    shorter[i] = halved<slots>(terms);
  }
}

template <class Value>
__global__ void __launch_bounds__(512, 2)
    row_sums(const Value* __restrict__ rows, Value* __restrict__ sums, long long count, int length, int lanes) {
  __shared__ Value met[TEAM];
  const Team<Value> team{lanes, met};
  int places[SLOTS];
  team.find(length, places);
  const int teams = blockDim.x / lanes;
  for (long long first = blockIdx.x * (long long)teams; first < count; first += gridDim.x * (long long)teams) {
    const long long own = first + threadIdx.x / lanes, at = own < count ? own : count - 1;
    Value terms[SLOTS];
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) terms[i] = places[i] < 0 ? (Value)-0.0 : rows[at * length + places[i]];
    const Value sum = team.sum(terms);
    if (team.lane() == 0 && own < count) sums[own] = sum;
  }
}

// ---- Bins

// The term of an entry and its bin. Sums by level have a second term, which is added to a second set of bins. Terms of
// bins that do not exist are skipped.
struct Entry {
  double term, other;
  long long bin;
};

struct BinTerms {
  static constexpr int kinds = 1;
  const double* terms;
  const long long* bins;

  __device__ __forceinline__ Entry operator[](long long i) const { return {terms[i], 0.0, bins[i]}; }
};

template <bool weighted> struct LevelTerms {
  static constexpr int kinds = 2;
  const float *rows, *weights;
  const double* importance;
  const float* ratios;
  const unsigned char* codes;
  const long long* sets;
  long long size;
  Blocks columns;

  __device__ __forceinline__ Entry operator[](long long i) const {
    const long long row = position_of(i, columns).block;
    const double ratio = ratios[row], scale = importance[row] * ratio, weight = weighted ? weights[i] : 1.0;
    return {scale * rows[i] * weight, scale * ratio * weight, codes[i] + sets[row] * size};
  }
};

// Returns the bits of a magnitude, which are ordered as the numbers are, with NaN above infinity: the host finds a term
// that is not finite by the maximum.
__device__ __forceinline__ unsigned long long magnitude(double x) {
  return (unsigned long long)__double_as_longlong(x) & 0x7fffffffffffffffull;
}

template <class Terms>
__device__ __forceinline__ void find_largest(const Terms& terms, long long count, unsigned long long* largest) {
  unsigned long long seen[2] = {};
  for (long long i = first_thread(); i < count; i += thread_count()) {
    const Entry entry = terms[i];
    const unsigned long long own[2] = {magnitude(entry.term), magnitude(entry.other)};
#pragma unroll
    for (int k = 0; k < Terms::kinds; ++k) seen[k] = own[k] > seen[k] ? own[k] : seen[k];
  }
#pragma unroll
  for (int k = 0; k < Terms::kinds; ++k) {
    for (int distance = 16; distance > 0; distance /= 2) {
      const unsigned long long other = __shfl_xor_sync(0xffffffffu, seen[k], distance);
      seen[k] = other > seen[k] ? other : seen[k];
    }
    if (threadIdx.x % 32 == 0) atomicMax(largest + k, seen[k]);
  }
}

// Rounds to the nearest integer, ties to even, for magnitudes up to 2**51. The spacing of doubles between 2**52 and
// 2**53 is one, so that adding 1.5 * 2**52 rounds the fraction away; the difference of the bits is then the integer.
__device__ __forceinline__ unsigned long long integer(double x) {
  constexpr double shift = 0x1.8p52;
  return (unsigned long long)(__double_as_longlong(x + shift) - __double_as_longlong(shift));
}

// Adds the rounded terms to their bins. If the bins fit into shared memory (2048 integers, 16 KiB), blocks add there
// first. Up to one copy per warp keeps threads from waiting for each other, since few bins are hit often. Then each
// block adds its sums to global memory once. The factors are powers of two, so that the products are exact; integers
// may be added in any order.
template <class Terms>
__device__ __forceinline__ void add_integers(const Terms& terms, long long count, double factor, double other_factor,
                                             long long bins, unsigned long long* sums) {
  constexpr int room = 2048;
  __shared__ unsigned long long near[room];
  const long long all = bins * Terms::kinds;
  const bool few = all <= room;
  const int warps = blockDim.x / 32, fitting = few ? room / (int)all : 0, copies = fitting < warps ? fitting : warps;
  for (int i = threadIdx.x; i < copies * all; i += blockDim.x) near[i] = 0;
  __syncthreads();
  unsigned long long* own = few ? near + threadIdx.x / 32 % copies * all : sums;
  for (long long i = first_thread(); i < count; i += thread_count()) {
    const Entry entry = terms[i];
    if (entry.bin < 0 || entry.bin >= bins) continue;
    atomicAdd(own + entry.bin, integer(entry.term * factor));
    if (Terms::kinds > 1) atomicAdd(own + bins + entry.bin, integer(entry.other * other_factor));
  }
  __syncthreads();
  for (int i = threadIdx.x; few && i < all; i += blockDim.x) {
    unsigned long long sum = 0;
    for (int copy = 0; copy < copies; ++copy) sum += near[copy * all + i];
    if (sum) atomicAdd(sums + i, sum);
  }
}

template <class Term>
__global__ void __launch_bounds__(256)
    bin_maximum(const Term* __restrict__ terms, const long long* __restrict__ bins, long long count,
                unsigned long long* __restrict__ largest) {
  find_largest(BinTerms{terms, bins}, count, largest);
}

template <class Term>
__global__ void __launch_bounds__(256)
    bin_sums(const Term* __restrict__ terms, const long long* __restrict__ bins, long long count, double factor,
             long long all, unsigned long long* __restrict__ sums) {
  add_integers(BinTerms{terms, bins}, count, factor, 0.0, all, sums);
}

template <bool weighted>
__global__ void __launch_bounds__(256)
    level_maxima(const float* __restrict__ rows, const float* __restrict__ weights,
                 const double* __restrict__ importance, const float* __restrict__ ratios,
                 const unsigned char* __restrict__ codes, const long long* __restrict__ sets, long long size,
                 long long count, long long columns, double inverse, unsigned long long* __restrict__ largest) {
  const Blocks blocks{columns, inverse};
  find_largest(LevelTerms<weighted>{rows, weights, importance, ratios, codes, sets, size, blocks}, count, largest);
}

template <bool weighted>
__global__ void __launch_bounds__(256)
    level_sums(const float* __restrict__ rows, const float* __restrict__ weights,
               const double* __restrict__ importance, const float* __restrict__ ratios,
               const unsigned char* __restrict__ codes, const long long* __restrict__ sets, long long size,
               long long count, long long columns, double inverse, double factor, double other_factor, long long bins,
               unsigned long long* __restrict__ sums) {
  const Blocks blocks{columns, inverse};
  const LevelTerms<weighted> terms{rows, weights, importance, ratios, codes, sets, size, blocks};
  add_integers(terms, count, factor, other_factor, bins, sums);
}

// Converts integers to numbers: the first `bins` are multiples of one unit, the others of another.
template <class Sum>
__global__ void __launch_bounds__(256)
    in_units(const long long* __restrict__ integers, double unit, double other_unit, long long bins,
             Sum* __restrict__ sums, long long count) {
  for (long long i = first_thread(); i < count; i += thread_count())
    sums[i] = (Sum)integers[i] * (i < bins ? unit : other_unit);
}
