// How the work of one call is laid over blocks of a CUDA device: plain C++, so that the tests can run the kernels on a
// CPU with the geometry that the device gets. The picture is at the top of cuda_kernels.h.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "params.h"

namespace gan_ops {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kUnroll = 4;     // rows that a thread loads before it uses the first of them
constexpr int kResident = 2;   // blocks of a processor at the same time, which the kernels' registers allow for
constexpr int kLine = 8;       // vectors of 16 bytes of a cache line: a block's columns are no fewer, if there are more

struct Geometry {
  int64_t row;     // vectors of a row of the tensor
  int rows, c;     // of the tensor; channels
  int plane;       // vectors of a channel in a row; 1 where a vector has several channels
  int width, span; // columns of a block, and of them those of one channel
  int ranks;       // rows that a block works on at the same time
  int groups;      // blocks side by side whose channels differ
  int pieces;      // blocks side by side that share one channel
  int chunk;       // rows of a block
  int parts;       // blocks that share channels: pieces x chunks of rows
  int padded;      // channels of all groups, the last of which may have some to spare
  unsigned* done;  // of each group, the parts that are summed up
  float* partials; // of each part, two sums of each channel
  float *via_mean, *via_var;  // of each channel, from backward's first launch to its second

  int blocks() const { return groups * parts; }
  int64_t bytes() const { return sizeof(float) * (groups + (2 + 2 * int64_t{parts}) * padded); }  // of workspace
  void use(void* workspace) {
    done = static_cast<unsigned*>(workspace), via_mean = static_cast<float*>(workspace) + groups;
    via_var = via_mean + padded, partials = via_var + padded;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of a full vector, 16 bytes, where each lies in one channel or has its channels in one half, aligned; or 1.
inline int vector_of(const Shape& s, bool split, std::initializer_list<const void*> pointers) {
  const int full = s.type == Type::f32 ? 4 : 8;
  const int64_t run = s.hw > 1 ? s.hw : split ? s.c / 2 : s.c;
  const bool aligned = std::all_of(pointers.begin(), pointers.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
  return aligned && run % full == 0 ? full : 1;
}

// The rows are cut into as many chunks as fill the processors once, or up to four times where that leaves fewer idle;
// but each thread has kUnroll rows, where there are as many.
inline int chunks_of(const Geometry& g, int processors) {
  const int64_t place = int64_t{kResident} * processors, side = int64_t{g.groups} * g.pieces;
  const int64_t most = std::max(1, g.rows / (g.ranks * kUnroll));
  int64_t best = 1;
  double best_share = 0;
  for (int waves = 1; waves <= 4; ++waves) {
    const int64_t chunks = std::clamp<int64_t>(waves * place / side, 1, most), blocks = chunks * side;
    const double share = double(blocks) / (ceil_div(blocks, place) * place);
    if (share > 1.02 * best_share) best = chunks, best_share = share;
  }
  return static_cast<int>(std::max(best, ceil_div(g.rows * g.row, int64_t{1} << 30)));  // offsets in it fit 32 bits
}

inline Geometry plan(const Shape& s, int vector, int processors, int threads) {
  Geometry g{};
  const int lanes = s.hw == 1 ? vector : 1, columns = static_cast<int>(s.c / lanes);  // lanes: channels of a vector
  g.rows = static_cast<int>(s.n), g.c = static_cast<int>(s.c);
  g.plane = static_cast<int>(s.hw == 1 ? 1 : s.hw / vector);
  g.row = int64_t{columns} * g.plane;
  g.pieces = static_cast<int>(ceil_div(g.plane, threads));
  g.span = static_cast<int>(ceil_div(g.plane, g.pieces));
  const int64_t wanted = std::clamp<int64_t>(ceil_div(threads * kUnroll, s.n), std::min(kLine, threads), threads);
  const int64_t most = std::max<int64_t>(1, wanted / g.span);  // channels side by side
  g.groups = static_cast<int>(ceil_div(columns, most));
  g.width = static_cast<int>(ceil_div(columns, g.groups)) * g.span;
  g.ranks = std::max(1, std::min<int>(threads / g.width, g.rows));
  g.chunk = static_cast<int>(ceil_div(g.rows, chunks_of(g, processors)));
  g.parts = static_cast<int>(ceil_div(g.rows, g.chunk)) * g.pieces;
  g.padded = g.groups * (g.width / g.span) * lanes;
  return g;
}

}  // namespace gan_ops
