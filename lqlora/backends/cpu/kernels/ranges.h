// Linkage of the functions that Python calls, and the distribution of work over threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

// Functions that Python calls. The last parameter of each is `int32_t threads`; loading.py declares the others.
#define LQLORA_EXPORT extern "C" __attribute__((visibility("default")))

// Entries below which another thread costs more than it saves. loading.py has twice this number.
constexpr int64_t kWorthAThread = 1 << 17;

// Runs `work(first, last)` on ranges of [0, count) that begin at multiples of `unit`, on several threads. `entries`
// says how much work there is in all, and `most` bounds the number of ranges. Each thread takes the next range when it
// has finished one, so that none waits for a thread that starts late or shares its core. Threads end with the call:
// nothing is left behind in a process that forks.
inline void in_ranges(int64_t count, int64_t unit, int64_t entries, int32_t threads,
               const std::function<void(int64_t, int64_t)>& work, int64_t most = std::numeric_limits<int64_t>::max()) {
    const int64_t units = (count + unit - 1) / unit;
    int64_t parts = entries / kWorthAThread;
    if (parts > most) parts = most;
    if (parts > units) parts = units;
    if (threads < 2 || parts < 2) return work(0, count);
    std::atomic<int64_t> next{0};
    const auto cut = [&](int64_t part) { return part == parts ? count : units * part / parts * unit; };
    const auto take = [&] {
        for (int64_t part = next++; part < parts; part = next++) work(cut(part), cut(part + 1));
    };
    std::vector<std::thread> others;
    try {
        while (static_cast<int64_t>(others.size()) + 1 < (parts < threads ? parts : threads)) others.emplace_back(take);
    } catch (const std::system_error&) {  // no more threads can be had: those that run do all the work
    }
    take();
    for (std::thread& other : others) other.join();
}
