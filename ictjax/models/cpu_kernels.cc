// Products with packed weights, attention over cached rows, and what is sampled from,
// on CPUs; called by XLA (jax.ffi). cpu_kernels.py says what they compute and compiles them for the
// machine's own instructions.
//
// A row of a result depends on that row's inputs alone: every sum runs over its terms in one order,
// whatever else is computed beside it, and by however many threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include <sched.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// A tile of a product: so many rows by so many vectors of columns, whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
#else
constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kColumns = kTileVectors * kLanes;  // of a panel of packed weights
constexpr int kBlockRows = 8 * kTileRows;        // that pass over a panel while it is at hand
constexpr int kQueries = 4;                      // that share one pass over keys
constexpr int64_t kFew = 8;  // tokens of a row: of so many each is the same as alone
constexpr int kFeatures = 4;                     // of keys, that are read at a time
constexpr int64_t kNear = 1024;  // positions, whose keys and values the processor's cache holds
constexpr int kSums = 12;                        // of values, at least, to hide their latency
constexpr double kAlone = 1 << 19;  // multiplications that are worth waking a thread for

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline Vector splat(float x) { return x - Vector{}; }
inline Vector load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
inline Vector load(const uint16_t* x) {  // bfloat16
  return reinterpret_cast<Vector>(
      __builtin_convertvector(*reinterpret_cast<const Halves*>(x), Words) << 16);
}
inline void store(float* to, Vector x) { *reinterpret_cast<Floats*>(to) = x; }
inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }

// To the nearest bfloat16, of two the even one, in the upper half of each word.
inline Words rounded(Vector x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words near = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits & 0xffff0000) | 0x400000 : near;  // NaN
}

// As it is multiplied: bfloat16, or the floats of these values.
inline void store_rounded(uint16_t* to, Vector x) {
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(rounded(x) >> 16, Halves);
}
inline void store_rounded(float* to, Vector x) {
  store(to, reinterpret_cast<Vector>(rounded(x)));
}

template <typename T>
void round(const float* x, int64_t count, T* y) {
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) store_rounded(y + at, load(x + at));
  float rest[kLanes] = {};
  T halves[kLanes];
  std::copy(x + at, x + count, rest);
  store_rounded(halves, load(rest));
  std::copy(halves, halves + (count - at), y + at);
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87, NaN of NaN.
inline Vector exponential(Vector x) {
  const Vector bounded = x < -87.0f ? splat(-87.0f) : x;
  const Vector shift = splat(12582912.0f);  // 1.5 * 2^23: rounds to whole numbers
  const Vector whole = (bounded * 1.44269504f + shift) - shift;
  const Vector rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector y = splat(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                            1.6666665459e-1f, 5.0000001201e-1f})
    y = y * rest + coefficient;
  y = y * rest * rest + rest + 1.0f;
  const Integers power = (__builtin_convertvector(whole, Integers) + 127) << 23;
  y *= reinterpret_cast<Vector>(power);
  return x < -87.0f ? Vector{} : y;
}

inline float largest(Vector x) {
  float most = x[0];
  for (int lane = 1; lane < kLanes; lane++) most = std::max(most, x[lane]);
  return most;
}

inline float total(Vector x) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += x[lane];
  return sum;
}

float* scratch(int64_t floats) {
  thread_local std::vector<float> held;
  if (held.size() < static_cast<size_t>(floats) + 16) held.resize(floats + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(held.data()) + 63) & ~uintptr_t{63});
}

// Calls `work(item)` for every item, on those threads of the pool that come in time. The caller
// takes what nobody has begun and waits for what somebody has: never for a thread that waits itself.
template <typename F>
void share(ffi::ThreadPool& pool, int64_t items, double multiplications, const F& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  const int64_t worth = 1 + static_cast<int64_t>(multiplications / kAlone);
  const int64_t helpers = std::min({pool.num_threads(), items, worth}) - 1;
  if (helpers < 1) {
    for (int64_t item = 0; item < items; item++) work(item);
    return;
  }
  auto state = std::make_shared<State>();
  auto take = [state, items, shared = &work] {  // alive as long as an item is left
    for (int64_t item; (item = state->next.fetch_add(1)) < items;) {
      (*shared)(item);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(decltype(take)(take));
  take();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < items; spins++) {
    if (spins > 4096) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// How a type of weights is packed and multiplied. `kDeep` consecutive inputs of an output lie side
// by side, and x is given in the form that suits them.
template <typename T>
struct Widened {
  using Weight = T;
  using Input = float;
  static constexpr int kDeep = 1;
  static Vector add(Vector sum, const float* x, const T* w) { return sum + *x * load(w); }
};

using Float = Widened<float>;
#if defined(__AVX512BF16__)
struct Half {
  using Weight = uint16_t;
  using Input = uint16_t;
  static constexpr int kDeep = 2;
  static Vector add(Vector sum, const uint16_t* x, const uint16_t* w) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                     (__m512bh)_mm512_set1_epi32(pair),
                                                     (__m512bh)_mm512_loadu_si512(w)));
  }
};
#else
using Half = Widened<uint16_t>;
#endif

// y[R, kColumns] = x[R, depth] w[depth, kColumns], of which `columns` are written.
template <typename Kind, int R>
void tile(const typename Kind::Input* x, int64_t depth, const typename Kind::Weight* w, float* y,
          int64_t wide, int64_t columns) {
  constexpr int kDeep = Kind::kDeep, kStep = kDeep * kLanes;
  Vector sums[R][kTileVectors] = {};
  for (int64_t k = 0; k < depth; k += kDeep, w += kTileVectors * kStep) {
    for (int v = 0; v < kTileVectors; v++) {
      __builtin_prefetch(w + 16 * kTileVectors * kStep + v * kStep);
      for (int r = 0; r < R; r++)
        sums[r][v] = Kind::add(sums[r][v], x + r * depth + k, w + v * kStep);
    }
  }
  for (int r = 0; r < R; r++, y += wide) {
    if (columns == kColumns) {
      for (int v = 0; v < kTileVectors; v++) store(y + v * kLanes, sums[r][v]);
    } else {
      float last[kColumns];
      for (int v = 0; v < kTileVectors; v++) store(last + v * kLanes, sums[r][v]);
      std::memcpy(y, last, columns * sizeof(float));
    }
  }
}

template <typename Kind, int R = kTileRows, typename... Arguments>
void tile_of(int64_t rows, Arguments... arguments) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<Kind, R>(arguments...);
    else
      tile_of<Kind, R - 1>(rows, arguments...);
  }
}

// y[rows, wide] = x[rows, depth] times panels [wide / kColumns, depth / kDeep, kColumns, kDeep].
template <typename Kind>
void multiply(ffi::ThreadPool& pool, const typename Kind::Input* x, int64_t rows, int64_t depth,
              const typename Kind::Weight* panels, int64_t wide, float* y) {
  const int64_t count = (wide + kColumns - 1) / kColumns;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  share(pool, blocks * count, static_cast<double>(rows) * depth * wide, [=](int64_t item) {
    const int64_t index = item % count, first = index * kColumns;
    const int64_t begin = item / count * kBlockRows, end = std::min(rows, begin + kBlockRows);
    for (int64_t row = begin; row < end; row += kTileRows)
      tile_of<Kind>(std::min<int64_t>(kTileRows, end - row), x + row * depth, depth,
                    panels + index * depth * kColumns, y + row * wide + first, wide,
                    std::min<int64_t>(kColumns, wide - first));
  });
}

ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer panels,
                    ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = panels.dimensions();
  const int64_t rows = x.dimensions()[0], given = x.dimensions()[1], depth = shape[1] * shape[3];
  const int64_t wide = y->dimensions()[1];
  const float* from = x.typed_data();
  if (panels.element_type() == ffi::F32) {
    multiply<Float>(pool, from, rows, depth, static_cast<const float*>(panels.untyped_data()), wide,
                    y->typed_data());
    return ffi::Error::Success();
  }
  thread_local std::vector<Half::Input> held;
  if (held.size() < static_cast<size_t>(rows * depth)) held.resize(rows * depth);
  Half::Input* narrow = held.data();
  for (int64_t row = 0; row < rows; row++) {
    round(from + row * given, given, narrow + row * depth);
    std::fill(narrow + row * depth + given, narrow + (row + 1) * depth, Half::Input{});
  }
  multiply<Half>(pool, narrow, rows, depth,
                 static_cast<const uint16_t*>(panels.untyped_data()), wide, y->typed_data());
  return ffi::Error::Success();
}

// logits[G, count vectors] += queries [G, D of width] by keys [D, S], both from feature h on. As much
// as is read of these is fetched meanwhile of what is read next, unless its pace is 0.
template <int G, int D>
void match(const float* q, int64_t width, const float* keys, int64_t held, int64_t count,
           float* logits, int64_t room, const float* next, int64_t pace) {
  Vector query[G][D];
  for (int g = 0; g < G; g++)
    for (int d = 0; d < D; d++) query[g][d] = splat(q[g * width + d]);
  for (int64_t at = 0; at < count * kLanes; at += kLanes) {
    Vector key[D];
    for (int d = 0; d < D; d++) {
      __builtin_prefetch(next + pace * (at * D + d * kLanes), 0, 2);
      key[d] = load(keys + d * held + at);
    }
    for (int g = 0; g < G; g++) {
      Vector sum = load(logits + g * room + at);
      for (int d = 0; d < D; d++) sum += query[g][d] * key[d];
      store(logits + g * room + at, sum);
    }
  }
}

// One query head of one token: the positions that it sees, and where its result goes.
struct Query {
  int64_t begin, end;
  float* y;
};

// Keys to fetch: of each feature so many vectors, and what lies between those of two features.
struct Ahead {
  const float* next;
  int64_t vectors, skipped;
};

// y[G, V vectors] = weights[G] values[., V vectors], over the sums of the weights: of the positions
// that all see together, then of those that only some do.
template <int G, int V>
void mix(const Query* asked, const float* weights, int64_t room, int64_t from, int64_t to,
         const float* values, int64_t width, int64_t h, const float* totals, Ahead ahead) {
  constexpr int kApart = std::max(1, kSums / (G * V));
  int64_t left = ahead.vectors;
  auto fetch = [&] {  // as many vectors as are read
    if (left == 0) return;
    __builtin_prefetch(ahead.next, 0, 2);
    ahead.next += kLanes;
    if (--left == 0) ahead.next += ahead.skipped, left = ahead.vectors;
  };
  Vector sums[kApart][G][V] = {};
  int64_t s = from;
  for (; s + kApart <= to; s += kApart)
    for (int a = 0; a < kApart; a++)
      for (int v = 0; v < V; v++) {
        fetch();
        const Vector value = load(values + (s + a) * width + h + v * kLanes);
        for (int g = 0; g < G; g++) sums[a][g][v] += weights[g * room + s + a] * value;
      }
  auto add = [&](int g, int64_t at) {
    for (int v = 0; v < V; v++)
      sums[0][g][v] += weights[g * room + at] * load(values + at * width + h + v * kLanes);
  };
  for (; s < to; s++)
    for (int g = 0; g < G; g++) add(g, s);
  for (int g = 0; g < G; g++) {
    for (int64_t at = asked[g].begin; at < std::min(from, asked[g].end); at++) add(g, at);
    for (int64_t at = to; at < asked[g].end; at++) add(g, at);
    for (int v = 0; v < V; v++) {
      for (int a = 1; a < kApart; a++) sums[0][g][v] += sums[a][g][v];
      store(asked[g].y + h + v * kLanes, sums[0][g][v] / totals[g]);
    }
  }
}

// Attention of G queries [G, width] over positions of one kv head. `logits` has room for whole
// vectors of all positions, G times; `next` are keys that are read after these.
template <int G>
void attend(const Query* asked, const float* q, int64_t width, const float* keys,
            const float* values, int64_t held, float scale, float* logits, const float* next) {
  const int64_t room = (held + kLanes - 1) / kLanes * kLanes;
  int64_t first = held, last = 0, from = 0, to = held;  // of any, and of all
  for (int g = 0; g < G; g++) {
    first = std::min(first, asked[g].begin), last = std::max(last, asked[g].end);
    from = std::max(from, asked[g].begin), to = std::min(to, asked[g].end);
  }
  to = std::max(from, to);
  const int64_t pace = last - first <= kNear ? 1 : 0;
  const int64_t low = first / kLanes * kLanes, high = (last + kLanes - 1) / kLanes * kLanes;
  const int64_t whole = std::min(high, held / kLanes * kLanes);  // a row may end within a vector
  for (int g = 0; g < G; g++)
    std::fill(logits + g * room + low, logits + g * room + high, 0.0f);
  int64_t h = 0;
  for (; h + kFeatures <= width; h += kFeatures)
    match<G, kFeatures>(q + h, width, keys + h * held + low, held, (whole - low) / kLanes,
                        logits + low, room, values + low * width + h * (whole - low), pace);
  for (; h < width; h++)
    match<G, 1>(q + h, width, keys + h * held + low, held, (whole - low) / kLanes, logits + low,
                room, values, 0);
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  float totals[G];
  for (int g = 0; g < G; g++) {
    float* row = logits + g * room;
    const auto [begin, end, y] = asked[g];
    for (int64_t at = whole; at < end; at++)
      for (h = 0; h < width; h++) row[at] += q[g * width + h] * keys[h * held + at];
    std::fill(row + low, row + begin, kNever);
    std::fill(row + end, row + high, kNever);
    Vector most = load(row + low), sum = {};  // of logits before they are scaled
    for (int64_t at = low; at < high; at += kLanes) most = larger(most, load(row + at));
    const float peak = largest(most);
    for (int64_t at = low; at < high; at += kLanes) {
      const Vector weight = exponential((load(row + at) - peak) * scale);
      store(row + at, weight);
      sum += weight;
    }
    totals[g] = total(sum);
  }
  for (h = 0; h < width;) {
    auto run = [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      if (h + V * kLanes > width) return false;
      mix<G, V>(asked, logits, room, from, to, values, width, h, totals,
                {next + low + h * held, pace * (whole - low) / kLanes, held - (whole - low)});
      h += V * kLanes;
      return true;
    };
    run(std::integral_constant<int, 4>{}) || run(std::integral_constant<int, 2>{}) ||
        run(std::integral_constant<int, 1>{});
  }
}

template <int G = kQueries, typename... Arguments>
void attend_of(int64_t queries, Arguments... arguments) {
  if constexpr (G > 0) {
    if (queries == G)
      attend<G>(arguments...);
    else
      attend_of<G - 1>(queries, arguments...);
  }
}

// y = x with its pairs (h, h + width / 2) turned by angles of these cosines and sines.
void turn(const float* x, int64_t width, const float* cosines, const float* sines, float* y) {
  const int64_t half = width / 2;
  for (int64_t h = 0; h < half; h++) {
    y[h] = x[h] * cosines[h] - x[half + h] * sines[h];
    y[half + h] = x[half + h] * cosines[h] + x[h] * sines[h];
  }
}

// Turns queries and new keys, writes keys and values to their rows, then attends over these. Of
// tokens that no row has a place for the result is 0.
ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> new_k,
                  ffi::Buffer<ffi::F32> new_v, ffi::Buffer<ffi::F32> cos,
                  ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32>,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> written,
                  ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> k,
                  ffi::ResultBuffer<ffi::F32> v, int32_t window, float scale) {
  const auto asked = q.dimensions(), kept = v->dimensions();
  const int64_t rows = asked[0], tokens = asked[1], heads = asked[2], width = asked[3];
  const int64_t kv_heads = kept[1], held = kept[2], group = heads / kv_heads;
  const float *queries = q.typed_data(), *new_keys = new_k.typed_data();
  const float *new_values = new_v.typed_data();
  const float *cosines = cos.typed_data(), *sines = sin.typed_data();
  float *keys = k->typed_data(), *values = v->typed_data();
  const int32_t *places = positions.typed_data(), *targets = written.typed_data();
  float* mixed = y->typed_data();
  const int64_t threads = pool.num_threads();  // of the pairs of a row and a head the next of each
  share(pool, rows * kv_heads, 2.0 * rows * tokens * heads * width * held, [=](int64_t item) {
    const int64_t row = item / kv_heads, kv_head = item % kv_heads;
    const int64_t from = item * width * held;
    for (int64_t token = 0; token < tokens; token++) {
      const int64_t at = row * tokens + token, target = targets[at];
      if (target < 0 || target >= held) continue;
      float* key = scratch(width);
      turn(new_keys + (at * kv_heads + kv_head) * width, width, cosines + at * width / 2,
           sines + at * width / 2, key);
      for (int64_t h = 0; h < width; h++) keys[from + h * held + target] = key[h];
      std::memcpy(values + from + target * width, new_values + (at * kv_heads + kv_head) * width,
                  width * sizeof(float));
    }
    const int64_t room = (held + kLanes - 1) / kLanes * kLanes;
    float* turned = scratch(kQueries * (width + room));
    Query asked[kQueries];
    int64_t waiting = 0;
    auto answer = [&](int64_t next) {
      attend_of(waiting, asked, turned, width, keys + from, values + from, held, scale,
                turned + kQueries * width, keys + from + next * width * held);
      waiting = 0;
    };
    for (int64_t token = 0; token < tokens; token++) {
      const int64_t at = row * tokens + token;
      const int64_t end = std::clamp<int64_t>(places[at] + 1, 1, held);
      const int64_t begin = window ? std::clamp<int64_t>(end - window, 0, end - 1) : 0;
      for (int64_t g = 0; g < group; g++) {
        const int64_t head = (at * heads + kv_head * group + g) * width;
        if (targets[at] < 0 || targets[at] >= held) {
          std::fill(mixed + head, mixed + head + width, 0.0f);
          continue;
        }
        turn(queries + head, width, cosines + at * width / 2, sines + at * width / 2,
             turned + waiting * width);
        asked[waiting++] = {begin, end, mixed + head};
        const bool last = g == group - 1 && token == tokens - 1;
        if (waiting == kQueries || (tokens <= kFew && g == group - 1)) answer(last ? threads : 0);
      }
    }
    answer(threads);
  });
  return ffi::Error::Success();
}

// Of each row of logits the first index of the largest, and the logarithm of the sum of e^logits.
ffi::Error Summarise(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits,
                     ffi::ResultBuffer<ffi::S32> ids, ffi::ResultBuffer<ffi::F32> normalisers) {
  const int64_t rows = logits.dimensions()[0], wide = logits.dimensions()[1];
  const int64_t whole = wide / kLanes * kLanes;
  const float* all = logits.typed_data();
  int32_t* found = ids->typed_data();
  float* sums = normalisers->typed_data();
  share(pool, rows, 8.0 * rows * wide, [=](int64_t row) {
    const float* x = all + row * wide;
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    float rest[kLanes];
    std::fill(rest, rest + kLanes, kNever);
    std::copy(x + whole, x + wide, rest);
    Vector most = load(rest);
    for (int64_t at = 0; at < whole; at += kLanes) most = larger(most, load(x + at));
    const float peak = largest(most);
    const float base = peak == kNever ? 0.0f : peak;
    Vector sum = exponential(load(rest) - base);
    for (int64_t at = 0; at < whole; at += kLanes) sum += exponential(load(x + at) - base);
    found[row] = std::find(x, x + wide, peak) - x;
    if (found[row] == wide) found[row] = 0;  // of a row of NaN
    if (peak == -kNever && std::none_of(x, x + wide, [](float y) { return std::isnan(y); }))
      sums[row] = peak;
    else
      sums[row] = base + std::log(total(sum));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ictjax_multiply, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ictjax_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("window")
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ictjax_summarise, Summarise,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// How weights are to be packed: columns of a panel, and inputs side by side in bfloat16.
extern "C" int ictjax_columns() { return kColumns; }
extern "C" int ictjax_deep() { return Half::kDeep; }
extern "C" int ictjax_lanes() { return kLanes; }
