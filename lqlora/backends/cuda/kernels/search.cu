// Search for the factor of each row's scale with the least squared error. A team of threads holds a row in registers,
// and tries all ratios on it without reading memory again.

// Lookup of the nearest level. Boundaries and levels lie in shared memory.
template <int bits> struct Nearest {
  const float *cuts, *levels;
  float zero;

  __device__ __forceinline__ float operator()(float normalized) const {
    return levels[cell_of<(1 << bits > MANY)>(normalized + zero, cuts, 1 << bits)] - zero;
  }
};

template <int bits> struct Row {
  float entries[SLOTS], weights[SLOTS];
  unsigned present;  // a bit for each slot that has an entry
  Nearest<bits> nearest;
  Team<float> team;

  template <class Term> __device__ __forceinline__ float sum(Term term) {
    float terms[SLOTS];
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) terms[i] = present >> i & 1u ? term(entries[i], weights[i]) : -0.0f;
    return team.sum(terms);
  }

  __device__ __forceinline__ float error(float ratio) {
    return sum([&](float entry, float weight) {
      const float difference = entry - ratio * nearest(entry / ratio);
      return weight * (difference * difference);
    });
  }

  // Returns the least-squares ratio of the current values v, sum(w * v * x) / sum(w * v * v). Returns the old ratio if
  // the new one has another sign or is not finite.
  __device__ __forceinline__ float refined(float ratio) {
    const float above = sum([&](float entry, float weight) { return weight * nearest(entry / ratio) * entry; });
    const float below = sum([&](float entry, float weight) {
      const float value = nearest(entry / ratio);
      return weight * value * value;
    });
    const float found = above / (below > 0 ? below : 1.0f);
    const bool is_finite = (__float_as_uint(found) & 0x7f800000u) != 0x7f800000u;
    return below > 0 && found * ratio > 0 && is_finite ? found : ratio;
  }
};

// Rows without weights use ones, and rows without zero points use zeros: neither changes a bit of the result. Two
// blocks of 512 threads on a multiprocessor leave 64 registers to each thread, for eight entries and eight weights of a
// row.
template <int bits>
__global__ void __launch_bounds__(512, 2)
    best_ratios(const float* __restrict__ rows, const float* __restrict__ weights, int weighted,
                const float* __restrict__ zeros, int affine, const float* __restrict__ boundaries,
                const float* __restrict__ levels, const float* __restrict__ grid, int tried, int refinements,
                float* __restrict__ best, long long count, int length, int lanes) {
  constexpr bool gaps = 1 << bits > MANY;
  __shared__ float cuts[place_of<gaps>(1 << bits)], table[1 << bits], met[TEAM];
  share_boundaries<gaps>(boundaries, 1 << bits, cuts);
  share(levels, table);
  Row<bits> row{{}, {}, 0, {cuts, table, 0.0f}, {lanes, met}};
  const int teams = blockDim.x / lanes;
  for (long long first = blockIdx.x * (long long)teams; first < count; first += gridDim.x * (long long)teams) {
    const long long own = first + threadIdx.x / lanes, at = own < count ? own : count - 1;
    row.nearest.zero = affine ? zeros[at] : 0.0f;
    row.present = 0;
    int places[SLOTS];
    row.team.find(length, places);
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      if (places[i] < 0) continue;
      row.entries[i] = rows[at * length + places[i]];
      row.weights[i] = weighted ? weights[at * length + places[i]] : 1.0f;
      row.present |= 1u << i;
    }
    float ratio = grid[0], error = row.error(ratio);
    for (int i = 1; i < tried; ++i) {
      const float other = grid[i], left = row.error(other);
      if (left < error) ratio = other, error = left;
    }
    for (int i = 0; i < refinements; ++i) {
      const float other = row.refined(ratio), left = row.error(other);
      if (left < error) ratio = other, error = left;
    }
    if (row.team.lane() == 0 && own < count) best[own] = ratio;
  }
}
