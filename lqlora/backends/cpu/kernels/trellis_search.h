// The search for the trellis codes of least squared error: the Viterbi algorithm. Each lane of a register searches a
// sequence of its own, so that steps need no exchange between lanes.
#pragma once

#include "numbers.h"
#include "sequences.h"
#include "sums.h"

#include <cstring>
#include <limits>

namespace {

#if defined(__AVX2__)
struct Together {
    using Register = __m256;
    static constexpr int kCount = 8;
    static Register all(float value) { return _mm256_set1_ps(value); }
    static Register load(const float* values) { return _mm256_loadu_ps(values); }
    static void store(float* values, Register own) { _mm256_storeu_ps(values, own); }
    static Register smaller(Register a, Register b) { return _mm256_min_ps(a, b); }  // a < b ? a : b
    static int are_less(Register a, Register b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
};
#elif defined(__SSE2__)
struct Together {
    using Register = __m128;
    static constexpr int kCount = 4;
    static Register all(float value) { return _mm_set1_ps(value); }
    static Register load(const float* values) { return _mm_loadu_ps(values); }
    static void store(float* values, Register own) { _mm_storeu_ps(values, own); }
    static Register smaller(Register a, Register b) { return _mm_min_ps(a, b); }
    static int are_less(Register a, Register b) { return _mm_movemask_ps(_mm_cmplt_ps(a, b)); }
};
#else
struct Together {
    using Register = float;
    static constexpr int kCount = 1;
    static Register all(float value) { return value; }
    static Register load(const float* values) { return *values; }
    static void store(float* values, Register own) { *values = own; }
    static Register smaller(Register a, Register b) { return a < b ? a : b; }
    static int are_less(Register a, Register b) { return a < b; }
};
#endif

constexpr int kTogether = Together::kCount;
static_assert(kSequencesAtOnce % kTogether == 0, "");

// Normalized weights beyond this magnitude count as this, as in lqlora.ops.
constexpr int kFarthest = 1024;

template <typename Real>
float target_of(Real value, Real divisor) {
    const Real quotient = value / divisor, most = kFarthest;
    return static_cast<float>(quotient < -most ? -most : quotient > most ? most : quotient);
}

// Writes the normalized weights of a sequence, every kTogether-th entry.
void write_targets(const TrellisEncoding& encoding, const Sequence& sequence, float* targets) {
    const int64_t size = sequence.size;
    if (encoding.dtype == FLOAT64) {
        const double* values = static_cast<const double*>(encoding.values) + sequence.at;
        const double scale = static_cast<const double*>(encoding.scales)[sequence.scale];
        const double divisor = scale == 0 ? std::numeric_limits<double>::infinity() : scale;
        for (int64_t i = 0; i < size; ++i) targets[i * kTogether] = target_of(values[i], divisor);
        return;
    }
    float wide[kSequence];
    const float* values = static_cast<const float*>(encoding.values) + sequence.at;
    if (encoding.dtype != FLOAT32) {
        widen(static_cast<const uint16_t*>(encoding.values) + sequence.at, encoding.dtype, size, wide);
        values = wide;
    }
    const float scale = static_cast<const float*>(encoding.scales)[sequence.scale];
    const float divisor = scale == 0 ? std::numeric_limits<float>::infinity() : scale;
    for (int64_t i = 0; i < size; ++i) targets[i * kTogether] = target_of(values[i], divisor);
}

// Weights on either side of the seam that the state at the seam is chosen by.
constexpr int64_t kContext = 32;

// Sums of all steps are kept up to this number, to decide on the way back which state was best: that is faster than to
// mark each decision when it is made, as is done where the sums would take more memory than this.
constexpr int64_t kMostSums = int64_t{1} << 22;

// The search of sequences of one size. Of a state s, the bits s >> kBits stay in the next one. Let best[p] be the least
// error of all paths after which the bits p stay. With kept = 2^(state bits - kBits), the next state holds p = s % kept
// and the new code s / kept, so that
//     best'[q] = min over j of  best[s % kept] + error of levels[s] ,   s = 2^kBits q + j .
template <int kBits>
struct Paths {
    static constexpr int kWidth = 1 << kBits;
    // For each q, a byte for each j above zero: the lanes in which j is less than all before it.
    static constexpr int kMarks = kWidth - 1;

    const TrellisEncoding& encoding;
    const int64_t kept, size, around, steps;
    const bool is_short;  // the bits that stay at the seam would leave little choice or none
    const bool keeps_sums;
    const int64_t choices;
    Buffer<float> targets, importance, sums, values;
    Buffer<uint8_t> marks;

    Paths(const TrellisEncoding& own, int64_t own_size)
        : encoding(own), kept(int64_t{1} << (own.trellis.state_bits - kBits)), size(own_size),
          around(kContext), steps(size > 2 * around ? size : 2 * around),
          is_short(size * kBits <= own.trellis.state_bits),
          keeps_sums(!is_short && (steps + 1) * kept * kTogether <= kMostSums),
          choices(is_short ? int64_t{1} << size * kBits : 0), targets(size * kTogether), importance(size * kTogether),
          sums(is_short ? 0 : (keeps_sums ? steps + 1 : 2) * kept * kTogether), values(choices * size),
          marks(is_short || keeps_sums ? 0 : steps * kept * kMarks) {
        for (int64_t choice = 0; choice < choices; ++choice) {
            // The codes again and again, from bit 0 on. A window may begin in any of the copies.
            uint64_t stream = 0;
            const int64_t bits = size * kBits, before = (15 / bits + 1) * bits;
            for (int64_t bit = 0; bit < 64; bit += bits) stream |= static_cast<uint64_t>(choice) << bit;
            for (int64_t i = 0; i < size; ++i) {
                const int64_t state = static_cast<int64_t>(stream >> (before + kBits * (i + 1) - own.trellis.state_bits));
                values.data[choice * size + i] = own.trellis.levels[state & ((kept << kBits) - 1)];
            }
        }
    }

    // Searches some sequences; unused lanes repeat the last one.
    void search(const Sequence* sequences, int count) {
        for (int lane = 0; lane < kTogether; ++lane) {
            const Sequence& own = sequences[lane < count ? lane : count - 1];
            write_targets(encoding, own, targets.data + lane);
            if (!encoding.importance) continue;
            for (int64_t i = 0; i < size; ++i) importance.data[i * kTogether + lane] = encoding.importance[own.at + i];
        }
        if (is_short) {
            for (int lane = 0; lane < count; ++lane) enumerate(lane, encoding.codes + sequences[lane].at);
            return;
        }
        // From the best open path around the seam take the bits that stay at the seam. Begin and end with these.
        int64_t at_seam[kTogether];
        for (int64_t i = 0; i < kept * kTogether; ++i) best(0)[i] = 0;
        for (int64_t t = 0; t < 2 * around; ++t) step(near_seam(t), t, t >= around);
        for (int lane = 0; lane < kTogether; ++lane) {
            const float* last = best(2 * around) + lane;
            int64_t stay = 0;
            for (int64_t p = 1; p < kept; ++p)
                if (last[p * kTogether] < last[stay * kTogether]) stay = p;
            for (int64_t t = 2 * around - 1; t >= around; --t) stay = state_before(stay, near_seam(t), t, lane) % kept;
            at_seam[lane] = stay;
        }
        for (int64_t i = 0; i < kept * kTogether; ++i) best(0)[i] = std::numeric_limits<float>::infinity();
        for (int lane = 0; lane < kTogether; ++lane) best(0)[at_seam[lane] * kTogether + lane] = 0;
        for (int64_t t = 0; t < size; ++t) step(t, t, true);
        for (int lane = 0; lane < count; ++lane) {
            uint8_t* codes = encoding.codes + sequences[lane].at;
            int64_t stay = at_seam[lane];
            for (int64_t t = size - 1; t >= 0; --t) {
                const int64_t state = state_before(stay, t, t, lane);
                codes[t] = static_cast<uint8_t>(state / kept);
                stay = state % kept;
            }
        }
    }

private:
    // A short circle is walked around more than once.
    int64_t near_seam(int64_t t) const { return (t - around + size * kContext) % size; }

    float* best(int64_t t) const { return sums.data + (keeps_sums ? t : t & 1) * kept * kTogether; }

    // The state of step t, which is that of weight `at`, on the best path after which some bits stay.
    int64_t state_before(int64_t stay, int64_t at, int64_t t, int lane) const {
        int found = 0;
        if (!keeps_sums) {
            const uint8_t* own = marks.data + (t * kept + stay) * kMarks;
            for (int j = 1; j < kWidth; ++j)
                if (own[j - 1] >> lane & 1) found = j;
            return stay * kWidth + found;
        }
        const int64_t first = stay * kWidth;
        const float* before = best(t) + first % kept * kTogether + lane;  // kept is a multiple of the width
        float least_sum = 0;
        for (int j = 0; j < kWidth; ++j) {
            const float gap = targets.data[at * kTogether + lane] - encoding.trellis.levels[first + j];
            const float square = gap * gap;
            const float error = encoding.importance ? importance.data[at * kTogether + lane] * square : square;
            const float sum = before[j * kTogether] + error;
            if (j && !(sum < least_sum)) continue;
            found = j;
            least_sum = sum;
        }
        return first + found;
    }

    void step(int64_t at, int64_t t, bool keeps) {
        uint8_t* own = keeps && !keeps_sums ? marks.data + t * kept * kMarks : nullptr;
        if (encoding.importance) own ? take<true, true>(at, t, own) : take<true, false>(at, t, own);
        else own ? take<false, true>(at, t, own) : take<false, false>(at, t, own);
    }

    template <bool kWeighs, bool kMarksLeast>
    void take(int64_t at, int64_t t, uint8_t* own) {
        using Register = Together::Register;
        const Register target = Together::load(targets.data + at * kTogether);
        const Register weight = kWeighs ? Together::load(importance.data + at * kTogether) : Register{};
        const float *levels = encoding.trellis.levels, *before = best(t);
        float* now = best(t + 1);
        // States whose lowest bits agree begin with the same sums.
        const int64_t apart = kept / kWidth;
        for (int64_t r = 0; r < apart; ++r) {
            Register from[kWidth];
            for (int j = 0; j < kWidth; ++j) from[j] = Together::load(before + (r * kWidth + j) * kTogether);
            for (int64_t q = r; q < kept; q += apart) {
                const float* reached = levels + q * kWidth;
                Register least_sum = from[0] + error<kWeighs>(target, weight, reached[0]);
                for (int j = 1; j < kWidth; ++j) {
                    const Register sum = from[j] + error<kWeighs>(target, weight, reached[j]);
                    if constexpr (kMarksLeast)
                        own[q * kMarks + j - 1] = static_cast<uint8_t>(Together::are_less(sum, least_sum));
                    least_sum = Together::smaller(sum, least_sum);
                }
                Together::store(now + q * kTogether, least_sum);
            }
        }
    }

    template <bool kWeighs>
    static Together::Register error(Together::Register target, Together::Register weight, float level) {
        const Together::Register gap = target - Together::all(level);
        if constexpr (kWeighs) return weight * (gap * gap);
        else return gap * gap;
    }

    // Tries all codes.
    void enumerate(int lane, uint8_t* codes) const {
        int64_t found = 0;
        float least_sum = 0;
        for (int64_t choice = 0; choice < choices; ++choice) {
            float sum = 0;
            for (int64_t i = 0; i < size; ++i) {
                const float gap = targets.data[i * kTogether + lane] - values.data[choice * size + i];
                sum += encoding.importance ? importance.data[i * kTogether + lane] * (gap * gap) : gap * gap;
            }
            if (choice && !(sum < least_sum)) continue;
            found = choice;
            least_sum = sum;
        }
        for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<uint8_t>(found >> kBits * i & kMarks);
    }
};

// Sequences of one size are searched together. There are at most three sizes.
template <int kBits>
void encode_sequences(const TrellisEncoding& encoding, int64_t first, int64_t last) {
    const Trellis& trellis = encoding.trellis;
    const int64_t sizes[] = {kSequence, trellis.block % kSequence, trellis.length % trellis.block % kSequence};
    for (int k = 0; k < 3; ++k) {
        if (sizes[k] == 0 || sizes[k] > trellis.block || (k == 2 && sizes[2] == sizes[1])) continue;
        Paths<kBits> paths(encoding, sizes[k]);
        Walk sequence(trellis, first);
        Sequence queued[kTogether];
        int count = 0;
        for (int64_t i = first; i < last; ++i, sequence.next()) {
            if (sequence.size == sizes[k]) queued[count++] = sequence;
            if (count == kTogether || (i + 1 == last && count)) {
                paths.search(queued, count);
                count = 0;
            }
        }
    }
}

void encode_trellis(const TrellisEncoding* encoding, int64_t first, int64_t last) {
    constexpr void (*by_bits[])(const TrellisEncoding&, int64_t, int64_t) = {encode_sequences<1>, encode_sequences<2>,
                                                                            encode_sequences<3>, encode_sequences<4>};
    by_bits[encoding->trellis.bits - 1](*encoding, first, last);
}

}  // namespace
