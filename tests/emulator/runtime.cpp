// Emulation of a kernel launch on one thread of the CPU. Blocks run one after the other, and each CUDA thread of a
// block is a fiber. A fiber runs until it must wait: at a barrier of the block, or at a meeting of lanes of a warp (a
// shuffle or __syncwarp). Then the scheduler continues the next fiber that can run.
//
// Every memory access is checked. It must be within an array of the launch or within shared memory, at a multiple of
// its size, and ordered against accesses of other threads to the same bytes. __syncthreads orders the threads of a
// block, and __syncwarp the lanes of a warp. Only the end of a kernel orders threads of different blocks. Shuffles
// order nothing, and atomic accesses do not race with each other.
//
// Fibers are switched only where they wait, so a race rarely shows in the results of one schedule. The check does not
// need the wrong result: it records who accessed each byte, and reports two accesses that nothing orders, in whichever
// order they were emulated.
#include "device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__) || defined(EMULATED_UCONTEXT)
#include <ucontext.h>
#define PORTABLE
#endif

namespace emulated {

constexpr int MOST_THREADS = 1024;
constexpr size_t STACK = 1 << 16;

// ---- Fibers -------------------------------------------------------------------------------------------------------

#ifdef PORTABLE
using Context = ucontext_t;
static void change(Context* from, Context* to) { swapcontext(from, to); }
static void prepare(Context* context, char* bottom, size_t size, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = size;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#else
// A switch is a call, so only the registers that a callee must preserve (System V ABI) have to be saved, on the fiber's
// own stack. No fiber changes the rounding mode or the floating-point flags, so these are not saved.
using Context = void*;  // the stack pointer
extern "C" void emulated_change(void** from, void* to);
asm(".text\n.globl emulated_change\n.hidden emulated_change\n.type emulated_change, @function\nemulated_change:\n"
    "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\n"
    "pop %rcx\njmp *%rcx\n"  // the processor would predict a return to the last call, which is in another fiber
    ".size emulated_change, .-emulated_change\n");
static void change(Context* from, Context* to) { emulated_change(from, *to); }
static void prepare(Context* context, char* bottom, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(bottom + size);
  *--top = nullptr;  // in place of a return address: the ABI wants rsp % 16 == 8 at the first instruction of a function
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six registers that emulated_change restores
  *context = top;
}
#endif

// ---- State of the threads ---------------------------------------------------------------------------------

struct Fiber {
  Context context;
  uint3 place;
  unsigned syncs;      // logical clock of the warp's __syncwarp calls, see complete()
  bool alive, waits;
  uint64_t received;
  int source;
};

// A shuffle or __syncwarp that some lanes of `mask` have reached; it completes when all of them have arrived.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  Collective kind;
  int line;
  uint64_t values[32];
};

struct Warp {
  unsigned alive;
  std::vector<Meeting> meetings;  // meetings at which lanes wait; disjoint masks may wait at several
};

struct State {
  const Launch* launch;
  Context scheduler;
  Fiber fibers[MOST_THREADS];
  Warp warps[MOST_THREADS / 32];
  char* stacks;
  int threads, alive, current;
  long block;
  unsigned barriers;  // how many the block has passed
  int waiting, barrier_line;
  bool failed;
  char error[400];
};

static State state;

static Fiber& self() { return state.fibers[state.current]; }

[[gnu::format(printf, 1, 2)]] static void fail(const char* format, ...) {
  if (!state.failed) {
    char what[250];
    va_list values;
    va_start(values, format);
    vsnprintf(what, sizeof what, format, values);
    va_end(values);
    snprintf(state.error, sizeof state.error, "block %ld, thread %d: %s", state.block, state.current, what);
  }
  state.failed = true;
}

// Switch to the scheduler. A thread that failed gives way forever: a kernel cannot be unwound, and the launch ends
// anyway.
static void give_way() { change(&self().context, &state.scheduler); }
static void stop() {
  for (;;) give_way();
}

// ---- Barriers and meetings ----------------------------------------------------------------------------------------

static void release_barrier() {
  state.waiting = 0;
  state.barriers++;
  for (int i = 0; i < state.threads; ++i) state.fibers[i].waits = false;
}

// The last thread that arrives releases all others and goes on at once. A barrier is an error if a thread of the block
// has returned, or waits at a barrier in another line: on a device both are undefined.
extern "C" void emulated_barrier(int line) {
  if (state.alive != state.threads) fail("__syncthreads in line %d, which other threads never reach: they returned", line);
  else if (state.waiting && line != state.barrier_line)
    fail("__syncthreads in line %d, while other threads are at that in line %d", line, state.barrier_line);
  if (state.failed) stop();
  state.barrier_line = line;
  if (++state.waiting == state.threads) return release_barrier();
  self().waits = true;
  while (self().waits) give_way();
}

extern "C" int emulated_lane() { return state.current % 32; }

// Returns the meeting that this lane takes part in, or null if the call is wrong.
static Meeting* find_meeting(Warp& warp, Collective kind, unsigned mask, int line) {
  if (!(mask >> emulated_lane() & 1)) return fail("line %d: the lane is not in its own mask %08x", line, mask), nullptr;
  if (mask & ~warp.alive) return fail("line %d: mask %08x names lanes that returned or never were", line, mask), nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (!(meeting.mask & mask)) continue;
    if (meeting.mask != mask) return fail("line %d: masks %08x and %08x overlap", line, mask, meeting.mask), nullptr;
    if (meeting.line != line || meeting.kind != kind)
      return fail("lanes of mask %08x are at line %d and at line %d", mask, line, meeting.line), nullptr;
    return &meeting;
  }
  warp.meetings.push_back({mask, 0, kind, line, {}});
  return &warp.meetings.back();
}

// Ends a meeting: every lane receives the value of its source lane, and can run again.
//
// __syncwarp advances a Lamport clock: all lanes of the mask get the largest of their clocks plus one. If an access
// comes before another by such calls, its clock is smaller, so ordered accesses are never reported. For masks of all
// lanes the converse holds too. With partial masks a smaller clock does not prove an order, and a race may be missed.
static void complete(Warp& warp, Meeting& meeting, int first_fiber) {
  unsigned syncs = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (meeting.mask >> lane & 1 && state.fibers[first_fiber + lane].syncs > syncs)
      syncs = state.fibers[first_fiber + lane].syncs;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(meeting.mask >> lane & 1)) continue;
    Fiber& fiber = state.fibers[first_fiber + lane];
    if (meeting.kind == Collective::sync) fiber.syncs = syncs + 1;
    fiber.received = meeting.values[fiber.source];
    fiber.waits = false;
  }
  warp.meetings.erase(warp.meetings.begin() + (&meeting - warp.meetings.data()));
}

extern "C" uint64_t emulated_meet(Collective kind, unsigned mask, uint64_t value, int source, int line) {
  Warp& warp = state.warps[state.current / 32];
  Meeting* meeting = find_meeting(warp, kind, mask, line);
  if (meeting && kind == Collective::shuffle && (source < 0 || source > 31 || !(mask >> source & 1)))
    fail("line %d: the shuffle reads lane %d, which is not in mask %08x", line, source, mask);
  if (state.failed) stop();
  const int lane = emulated_lane();
  meeting->values[lane] = value;
  meeting->arrived |= 1u << lane;
  self().source = source;
  self().waits = true;
  if (meeting->arrived == mask) complete(warp, *meeting, state.current - lane);
  while (self().waits) give_way();
  return self().received;
}

// ---- Memory -------------------------------------------------------------------------------------------------------

struct Access {
  long block = -1;
  int thread;
  unsigned barriers, syncs;
  bool atomic;
};

struct Byte {
  // The last write, and the last reads by two different threads. A write is checked against both: the later read may be
  // by the writing thread itself, and would hide the other one. Reads of more threads are forgotten.
  Access write, read, other_read;
};

struct Region {
  uintptr_t begin, end;
  bool shared;
  std::vector<Byte> bytes;
};

static std::vector<Region> regions;

// Barriers stop all threads of a block, so an access with fewer passed barriers is ordered before one with more.
static bool ordered(const Access& before, const Access& now) {
  if (before.block < 0) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.barriers < now.barriers) return true;
  return before.thread / 32 == now.thread / 32 && before.syncs < now.syncs;
}

static bool races(const Access& before, const Access& now) {
  return !(before.atomic && now.atomic) && !ordered(before, now);
}

static const char* visit(Byte& byte, const Access& now, bool writes, bool shared) {
  if (!writes && shared && byte.write.block < 0) return "reads shared memory that no thread of the block has written";
  if (races(byte.write, now)) return writes ? "writes what another thread wrote" : "reads what another thread wrote";
  if (writes) {
    if (races(byte.read, now) || races(byte.other_read, now)) return "writes what another thread reads";
    byte.write = now;
  } else if (byte.read.thread != now.thread || byte.read.block != now.block) {
    byte.other_read = byte.read;
    byte.read = now;
  } else {
    byte.read = now;
  }
  return nullptr;
}

static bool is_own(uintptr_t address) {
  const auto stacks = reinterpret_cast<uintptr_t>(state.stacks), here = reinterpret_cast<uintptr_t>(&emulated_here);
  return (address >= stacks && address < stacks + STACK * MOST_THREADS) ||
         (address >= here && address < here + sizeof emulated_here);
}

static void require_multiple(uintptr_t address, size_t size) {
  if (address % size == 0) return;
  fail("%zu bytes at an address that is not a multiple of %zu", size, size);
  stop();
}

static void look_at(const void* pointer, size_t size, bool writes, bool atomic = false) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (is_own(address) || state.failed) return;
  const char* what = writes ? "write" : "read";
  for (Region& region : regions) {
    if (address < region.begin || address >= region.end) continue;
    if (address + size > region.end) break;
    if (size <= 16 && !(size & (size - 1))) require_multiple(address, size);
    const Access now{state.block, state.current, state.barriers, self().syncs, atomic};
    for (size_t i = 0; i < size; ++i)
      if (const char* wrong = visit(region.bytes[address - region.begin + i], now, writes, region.shared)) {
        fail("byte %zu of %s %s, with nothing between the two", address - region.begin + i,
             region.shared ? "shared memory: it" : "an array: the thread", wrong);
        stop();
      }
    return;
  }
  fail("%s of %zu bytes out of bounds", what, size);
  stop();
}

extern "C" void emulated_vector(const void* address) { require_multiple(reinterpret_cast<uintptr_t>(address), 16); }
extern "C" void emulated_atomic(const void* address, int size) { look_at(address, size, true, true); }

// Functions that the compiler calls at each access of a kernel: the interface of ThreadSanitizer, whose library is not
// linked.
#pragma GCC visibility push(default)
extern "C" {
#define EMULATED_ACCESSES(size)                                                               \
  void __tsan_read##size(void* address) { look_at(address, size, false); }                   \
  void __tsan_write##size(void* address) { look_at(address, size, true); }                   \
  void __tsan_unaligned_read##size(void* address) { look_at(address, size, false); }         \
  void __tsan_unaligned_write##size(void* address) { look_at(address, size, true); }
EMULATED_ACCESSES(1) EMULATED_ACCESSES(2) EMULATED_ACCESSES(4) EMULATED_ACCESSES(8) EMULATED_ACCESSES(16)
void __tsan_read_range(void* address, unsigned long size) { look_at(address, size, false); }
void __tsan_write_range(void* address, unsigned long size) { look_at(address, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#pragma GCC visibility pop

// ---- Running ------------------------------------------------------------------------------------------------------

Here emulated_here;

static void leave() {
  Fiber& fiber = self();
  Warp& warp = state.warps[state.current / 32];
  fiber.alive = false;
  state.alive--;
  warp.alive &= ~(1u << emulated_lane());
  if (state.waiting) fail("the thread returned, while others wait at __syncthreads in line %d", state.barrier_line);
  for (const Meeting& meeting : warp.meetings)
    if (meeting.mask >> emulated_lane() & 1)
      fail("the thread returned, while lanes of mask %08x wait for it in line %d", meeting.mask, meeting.line);
}

static void run_thread() {
  state.launch->kernel(state.launch->arguments);
  leave();
  stop();
}

// Returns the thread or block that comes at a turn: forwards (0), backwards (1), or in strides. The stride is the next
// number from `schedule` on that is coprime to the count, so the turns are a permutation. Tests run several schedules,
// because the results of a correct kernel do not depend on the order.
static long in_order(long turn, long count, unsigned schedule) {
  if (schedule == 0) return turn;
  if (schedule == 1) return count - 1 - turn;
  long stride = schedule % count;
  auto divides = [](long a, long b) { while (b) { const long rest = a % b; a = b; b = rest; } return a; };
  while (divides(stride, count) != 1) ++stride;
  return (turn * stride + schedule) % count;
}

static void start_block(const Launch& launch, long block) {
  const uint3 grid = launch.grid, size = launch.block;
  state.block = block;
  state.alive = state.threads;
  state.waiting = 0;
  state.barriers = 0;
  emulated_here.block = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
  for (int i = 0; i < state.threads; ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.place = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    fiber.syncs = 0;
    fiber.alive = true;
    fiber.waits = false;
    // Tops of stacks at equal distances would fall into the same few sets of the cache, so they are staggered.
    prepare(&fiber.context, state.stacks + i * STACK, STACK - i % 64 * 192 - 64, run_thread);
  }
  for (int w = 0; w * 32 < state.threads; ++w) {
    const int lanes = state.threads - w * 32;
    state.warps[w].alive = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
    state.warps[w].meetings.clear();
  }
  // Shared memory starts with a pattern and without accesses: a block that reads what another left there must fail.
  for (Region& region : regions)
    if (region.shared) {
      memset(reinterpret_cast<char*>(region.begin), 0xA5, region.end - region.begin);
      region.bytes.assign(region.bytes.size(), Byte{});
    }
}

// Runs the fibers of a block round by round, in the order of the schedule. Each round continues every fiber that does
// not wait. A round in which no fiber can run, while some are alive, is a deadlock.
static void run_block(const Launch& launch) {
  while (state.alive && !state.failed) {
    bool ran = false;
    for (int turn = 0; turn < state.threads && !state.failed; ++turn) {
      const int i = int(in_order(turn, state.threads, launch.schedule));
      Fiber& fiber = state.fibers[i];
      if (!fiber.alive || fiber.waits) continue;
      ran = true;
      state.current = i;
      emulated_here.thread = fiber.place;
      change(&state.scheduler, &fiber.context);
    }
    if (!ran) fail("deadlock: no thread can go on; some wait for others that wait elsewhere");
  }
}

extern "C" const char* emulated_launch(const Launch* launch) {
  const uint3 grid = launch->grid, size = launch->block;
  state.launch = launch;
  state.threads = int(size.x * size.y * size.z);
  state.failed = false;
  if (!state.stacks) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) return "no memory for stacks";
    state.stacks = static_cast<char*>(memory);
  }
  regions.clear();
  for (int i = 0; i < launch->array_count; ++i) {
    const auto begin = uintptr_t(launch->arrays[2 * i]), end = uintptr_t(launch->arrays[2 * i + 1]);
    regions.push_back({begin, end, false, std::vector<Byte>(end - begin)});
  }
  const auto begin = uintptr_t(launch->shared_begin), end = uintptr_t(launch->shared_end);
  if (end > begin) regions.push_back({begin, end, true, std::vector<Byte>(end - begin)});
  emulated_here.block_size = size;
  emulated_here.grid_size = grid;
  const long blocks = long(grid.x) * grid.y * grid.z;
  for (long turn = 0; turn < blocks && !state.failed; ++turn) {
    start_block(*launch, in_order(turn, blocks, launch->schedule));
    run_block(*launch);
  }
  return state.failed ? state.error : nullptr;
}

}  // namespace emulated
