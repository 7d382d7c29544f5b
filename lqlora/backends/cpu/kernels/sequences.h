// Sequences of an array in trellis codes: their number, and a walk over them.
#pragma once

#include "kernels.h"

namespace {

// Most weights of a sequence, as SEQUENCE of lqlora.ops says.
constexpr int64_t kSequence = 256;

// Sequences that are searched at once, each in a lane of registers. A multiple of the lanes of every instruction set.
constexpr int64_t kSequencesAtOnce = 8;

inline int64_t pieces(int64_t size) { return (size + kSequence - 1) / kSequence; }

inline int64_t sequences_a_line(const Trellis& trellis) {
    return trellis.length / trellis.block * pieces(trellis.block) + pieces(trellis.length % trellis.block);
}

inline int64_t sequence_count(const Trellis& trellis) {
    return trellis.length ? trellis.count / trellis.length * sequences_a_line(trellis) : 0;
}

struct Sequence {
    int64_t at, size;  // the first weight, and the number of weights
    int64_t scale;     // the number of the block
};

// A walk over sequences. All together fill the array without gaps.
struct Walk : Sequence {
    Walk(const Trellis& of, int64_t index) : trellis(of) {
        const int64_t whole = of.length / of.block, blocks = whole + (of.length % of.block != 0);
        const int64_t line = index / sequences_a_line(of), within = index % sequences_a_line(of);
        int64_t own = within / pieces(of.block);
        if (own > whole) own = whole;
        at = line * of.length + own * of.block + (within - own * pieces(of.block)) * kSequence;
        scale = line * blocks + own;
        line_end = (line + 1) * of.length;
        block_end = line * of.length + (own + 1) * of.block;
        fit();
    }

    void next() {
        at += size;
        if (at == block_end) {
            ++scale;
            if (at == line_end) line_end += trellis.length;
            block_end = at + trellis.block;
        }
        fit();
    }

private:
    void fit() {
        if (block_end > line_end) block_end = line_end;
        size = block_end - at < kSequence ? block_end - at : kSequence;
    }

    const Trellis& trellis;
    int64_t block_end, line_end;
};

}  // namespace
