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
    const int64_t kept, size, around;
    const bool is_short;  // a state would see codes more than once
    int64_t choices;
    Buffer<float> targets, importance, best, next, values;
    Buffer<uint8_t> marks;
    Buffer<int64_t> after;

    Paths(const TrellisEncoding& own, int64_t own_size)
        : encoding(own), kept(int64_t{1} << (own.trellis.state_bits - kBits)), size(own_size),
          around(size < 2 ? 1 : least(size / 2, kContext)), is_short(size * kBits < own.trellis.state_bits - kBits),
          choices(is_short ? int64_t{1} << size * kBits : 0), targets(size * kTogether), importance(size * kTogether),
          best(kept * kTogether), next(kept * kTogether), values(choices * size),
          marks(is_short ? 0 : (size > 2 * around ? size : 2 * around) * kept * kMarks), after(kTogether) {
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
        for (int64_t i = 0; i < kept * kTogether; ++i) best.data[i] = 0;
        for (int64_t t = 0; t < 2 * around; ++t) step(t < around ? size - around + t : t - around, t, t >= around);
        for (int lane = 0; lane < kTogether; ++lane) {
            int64_t from = 0;
            for (int64_t p = 1; p < kept; ++p)
                if (best.data[p * kTogether + lane] < best.data[from * kTogether + lane]) from = p;
            for (int64_t t = 2 * around - 1; t >= around; --t) from = state_before(from, t, lane) % kept;
            after.data[lane] = from;
        }
        for (int64_t i = 0; i < kept * kTogether; ++i) best.data[i] = std::numeric_limits<float>::infinity();
        for (int lane = 0; lane < kTogether; ++lane) best.data[after.data[lane] * kTogether + lane] = 0;
        for (int64_t t = 0; t < size; ++t) step(t, t, true);
        for (int lane = 0; lane < count; ++lane) {
            uint8_t* codes = encoding.codes + sequences[lane].at;
            int64_t from = after.data[lane];
            for (int64_t t = size - 1; t >= 0; --t) {
                const int64_t state = state_before(from, t, lane);
                codes[t] = static_cast<uint8_t>(state / kept);
                from = state % kept;
            }
        }
    }

private:
    // The state of step t on the best path after which some bits stay.
    int64_t state_before(int64_t stay, int64_t t, int lane) const {
        const uint8_t* own = marks.data + (t * kept + stay) * kMarks;
        int j = kMarks;
        while (j > 0 && !(own[j - 1] >> lane & 1)) --j;
        return stay * kWidth + j;
    }

    void step(int64_t at, int64_t t, bool keeps) {
        uint8_t* own = keeps ? marks.data + t * kept * kMarks : nullptr;
        if (encoding.importance) keeps ? take<true, true>(at, own) : take<true, false>(at, own);
        else keeps ? take<false, true>(at, own) : take<false, false>(at, own);
        float* const before = best.data;
        best.data = next.data;
        next.data = before;
    }

    template <bool kWeighs, bool kKeeps>
    void take(int64_t at, uint8_t* own) {
        using Register = Together::Register;
        const Register target = Together::load(targets.data + at * kTogether);
        const Register weight = kWeighs ? Together::load(importance.data + at * kTogether) : Register{};
        const float *levels = encoding.trellis.levels, *before = best.data;
        float* now = next.data;
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
                    if constexpr (kKeeps) own[q * kMarks + j - 1] = static_cast<uint8_t>(Together::are_less(sum, least_sum));
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
