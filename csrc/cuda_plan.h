// How the work of one call is laid over blocks of a CUDA device: plain C++, so that the tests can run the kernels on a
// CPU with the geometry that the device gets.
//
// A tensor is seen as `columns` of `positions` vectors. In rows a vector holds neighbouring channels of one position
// and a column is those channels; in planar it holds neighbouring positions of one channel and a column is that
// channel. A block has `width` columns (threadIdx.x) by `ranks` positions at a time (threadIdx.y): a strip of columns,
// blockIdx.x, in a chunk of positions, blockIdx.y. Statistics are of columns, so strips have nothing to do with each
// other. Either two launches go over chunks (reduce leaves each chunk's statistics in the workspace, apply combines
// them), or, where a strip is small enough, one launch holds it in shared memory (whole).
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "params.h"

namespace gan_ops {

constexpr int kThreads = 512;  // of a block, at most
constexpr int kUnroll = 4;  // independent loads of a thread in flight
constexpr int kRadix = 8;   // partial results that one thread merges in each round of a block's combination

// Tuning, in one place.
constexpr int kBlocksPerProcessor = 2;
constexpr int kWideRow = 1024;          // bytes; rows at least this long have strips of kWideStrip
constexpr int kWideStrip = 128;         // bytes of a row that a strip takes
constexpr int kNarrowStrip = 64;        // as above in shorter rows: more strips make for fewer chunks to combine
constexpr int kNarrowestStrip = 32;     // a sector of L2
constexpr int kMostPartials = 4096;     // chunks x channels whose partial results each block of apply reads
constexpr int kSmallStrip = 48 * 1024;  // bytes that one block streams in less than the time of another launch

// What the plan needs to know of a device. Tests take few threads.
struct Device {
  int processors;
  int64_t shared_bytes;  // dynamic shared memory of a block, at most
  int threads = kThreads;
};

struct Geometry {
  int vector;                          // elements
  int64_t columns, plane, positions;   // plane: vectors of a channel of one image; 1 in rows
  int64_t strips, chunks, chunk_size;  // chunk_size: positions
  int width, ranks;
  int64_t step_images, step_inner;  // from one position of a thread to its next: whole planes, and the rest
  int slots;                        // partial results that shared memory has room for
  int kept_at;                      // byte in shared memory where `whole` holds the strip
};

enum class Step { reduce, apply, whole };

// One or two launches, with what each works on.
template <class Work>
struct Launches {
  struct Launch {
    Step step;
    Work work;
    Geometry geometry;
    int64_t shared_bytes;
  };
  int count;
  Launch at[2];
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int size_of(Type type) {
  switch (type) {
    case Type::f64: return 8;
    case Type::f32: return 4;
    default: return 2;
  }
}

inline int statistic_size(Type type) { return type == Type::f64 ? 8 : 4; }

// Channels of which a thread keeps statistics.
inline int lanes(const Shape& s, int vector) { return s.rows ? vector : 1; }

// 16 bytes, except in double precision, which nothing here needs fast.
inline int full_vector(Type type) { return type == Type::f64 ? 1 : 16 / size_of(type); }

// Full vectors where each one lies in one channel (planar) or in one half of the channels (rows), aligned.
inline int vector_width(const Shape& s, bool split, std::initializer_list<const void*> pointers) {
  const int full = full_vector(s.type);
  const int64_t run = s.rows ? (split ? s.c / 2 : s.c) : s.hw;
  const bool aligned = std::all_of(pointers.begin(), pointers.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
  return aligned && run % full == 0 ? full : 1;
}

// The geometry but for chunks: strips of about strip_bytes of a row (planar: of one channel).
inline Geometry strips_of(const Shape& s, int vector, int strip_bytes, const Device& device) {
  Geometry g{};
  g.vector = vector;
  g.columns = s.rows ? s.c / vector : s.c;
  g.plane = s.rows ? 1 : s.hw / vector;
  g.positions = s.n * g.plane;
  const int64_t widest = s.rows ? std::max(1, std::min(strip_bytes / (vector * size_of(s.type)), device.threads)) : 1;
  g.strips = ceil_div(g.columns, widest);
  g.width = static_cast<int>(ceil_div(g.columns, g.strips));
  int threads = std::min(32, device.threads);
  while (threads < device.threads && threads < g.positions * g.width) threads *= 2;
  g.ranks = threads / g.width;
  g.step_images = g.ranks / g.plane;
  g.step_inner = g.ranks % g.plane;
  g.slots = static_cast<int>(g.ranks - ceil_div(g.ranks, kRadix)) * g.width;
  const int64_t words = int64_t{g.slots} * (2 * lanes(s, vector) + 1) + 2 * g.width * lanes(s, vector);
  g.kept_at = static_cast<int>(ceil_div(words * statistic_size(s.type), 16) * 16);
  return g;
}

inline Geometry in_chunks(const Shape& s, int vector, const Device& device) {
  const bool wide = s.c * size_of(s.type) >= kWideRow;
  Geometry g = strips_of(s, vector, wide ? kWideStrip : kNarrowStrip, device);
  const int64_t busy = int64_t{kBlocksPerProcessor} * device.processors / g.strips;
  const int64_t cheap = kMostPartials / (g.width * lanes(s, vector));
  const int64_t worthwhile = ceil_div(g.positions, int64_t{g.ranks} * kUnroll);
  g.chunk_size = ceil_div(g.positions, std::max<int64_t>(1, std::min({busy, cheap, worthwhile})));
  g.chunks = ceil_div(g.positions, g.chunk_size);
  return g;
}

// Bytes of `tensors` tensors that a block holds of its strip.
inline int64_t kept_bytes(const Shape& s, const Geometry& g, int tensors) {
  return tensors * g.positions * g.width * g.vector * size_of(s.type);
}

// One chunk, held in shared memory: true where it fits, and either it is small or the strips keep the device busy.
inline bool in_one(const Shape& s, int vector, int tensors, const Device& device, Geometry& g) {
  for (int strip = kWideStrip; strip >= kNarrowestStrip; strip /= 2) {
    g = strips_of(s, vector, strip, device);
    g.chunks = 1;
    g.chunk_size = g.positions;
    const int64_t kept = kept_bytes(s, g, tensors);
    if (g.kept_at + kept > device.shared_bytes) continue;
    const bool busy = 8 * g.strips >= 5 * device.processors * ceil_div(g.strips, device.processors);
    const bool narrowest = !s.rows || strip == kNarrowestStrip;
    if (busy || (narrowest && kept <= kSmallStrip)) return true;
  }
  return false;
}

template <class Work>
typename Launches<Work>::Launch launch_of(Step step, const Work& work, const Geometry& g, int64_t kept) {
  return {step, work, g, g.kept_at + kept};
}

inline int64_t workspace_bytes_of(const Shape& s, const Device& device) {
  int64_t chunks = 0;
  for (int vector : {1, vector_width(s, false, {})}) chunks = std::max(chunks, in_chunks(s, vector, device).chunks);
  return chunks * s.c * 2 * statistic_size(s.type);
}

inline Launches<Forward> plan(const Forward& f, const Device& device) {
  const Shape& s = f.shape;
  const int vector = vector_width(s, f.out[1], {f.x, f.right, f.sum, f.out[0], f.out[1]});
  Launches<Forward> launches{};
  Geometry g;
  if (!f.normalise || !f.training) {
    launches.at[launches.count++] = launch_of(Step::apply, f, in_chunks(s, vector, device), 0);
  } else if (in_one(s, vector, 1, device, g)) {
    launches.at[launches.count++] = launch_of(Step::whole, f, g, kept_bytes(s, g, 1));
  } else {
    g = in_chunks(s, vector, device);
    launches.at[launches.count++] = launch_of(Step::reduce, f, g, 0);
    Forward rest = f;
    if (f.right) {  // reduce has added up the seam
      rest.x = f.sum;
      rest.right = rest.sum = nullptr;
    }
    launches.at[launches.count++] = launch_of(Step::apply, rest, g, 0);
  }
  return launches;
}

inline Launches<Backward> plan(const Backward& b, const Device& device) {
  const Shape& s = b.shape;
  const int vector = vector_width(s, b.grad[1], {b.grad[0], b.grad[1], b.x, b.dx});
  const bool sums = b.training || b.dweight || b.dbias;
  Launches<Backward> launches{};
  Geometry g;
  if (sums && in_one(s, vector, 2, device, g)) {
    launches.at[launches.count++] = launch_of(Step::whole, b, g, kept_bytes(s, g, 2));
    return launches;
  }
  g = in_chunks(s, vector, device);
  if (sums) launches.at[launches.count++] = launch_of(Step::reduce, b, g, 0);
  launches.at[launches.count++] = launch_of(Step::apply, b, g, 0);
  return launches;
}

}  // namespace gan_ops
