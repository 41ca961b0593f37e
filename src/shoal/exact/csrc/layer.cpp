// Ranges of decoder layers in one call, as defined in layer.py.

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "pool.h"

#include <algorithm>
#include <new>

namespace shoal {
namespace {

constexpr int LEAST_ENTRIES = 1 << 14;  // of rows; fewer are not worth another thread
constexpr int ROWS_AT_ONCE = 480;       // their wide intermediate results stay in the third cache

// Calls row(t, memory) for all rows; memory holds one row of `width` floats.
template <class Row>
void each_row(int rows, int width, Row row) {
    const int at_once = std::max(1, LEAST_ENTRIES / std::max(1, width));
    parallel((rows + at_once - 1) / at_once, [&](int chunk) {
        static thread_local Bytes memory;
        memory.reserve(size_t(width) * sizeof(float));
        for (int t = chunk * at_once; t < std::min(rows, (chunk + 1) * at_once); t++)
            row(t, memory.as<float>());
    });
}

// Makes room for the codes of M rows that `linear` takes.
void prepare(const Linear& linear, int M, Codes& codes) {
    codes.M = M;
    codes.K = linear.K;
    codes.stride = size_t(linear.inputs) * (linear.kind == Kind::w16 ? 2 : 1);
    codes.codes.reserve(codes.stride * size_t(M));
    codes.scale.reserve(size_t(M) * sizeof(float));
}

template <class T>
void set_row(float (*quantise)(const float*, int, T*), T zero, const float* x, int inputs, int m,
             Codes& codes) {
    T* to = reinterpret_cast<T*>(codes.codes.as<char>() + size_t(m) * codes.stride);
    codes.scale.as<float>()[m] = quantise(x, codes.K, to);
    std::fill(to + codes.K, to + inputs, zero);
}

void set_row(const Linear& linear, const float* x, int m, Codes& codes) {
    if (linear.kind == Kind::w16)
        set_row<int16_t>(kernels().quantise16, 0, x, linear.inputs, m, codes);
    else
        set_row<uint8_t>(kernels().quantise, 128, x, linear.inputs, m, codes);
}

// What the layers of one call work in; kept by each calling thread for the next one.
struct Memory {
    Codes codes;
    Bytes joined, queries, query_scale, seen, wide, result;
};

Memory& this_threads_memory() {
    static thread_local Memory memory;
    return memory;
}

// Queries of one token are rounded for the attention, keys and values into the pools.
class Store {
  public:
    Store(const shoal_cache& cache, const shoal_scores& how, const shoal_step& step, int heads,
          Memory& memory)
        : cache(cache), step(step), heads(heads), stride(Queries::stride(cache.key_width)),
          scaling(how.scaling) {
        const size_t rows = size_t(step.tokens) * size_t(heads);
        memory.queries.reserve(rows * size_t(stride) * sizeof(int16_t));
        memory.query_scale.reserve(rows * sizeof(float));
        codes = memory.queries.as<int16_t>();
        scale = memory.query_scale.as<float>();
    }

    void query(int t, const float* q) const {
        for (int h = 0; h < heads; h++) {
            const size_t at = size_t(t) * heads + h;
            int16_t* to = codes + at * stride;
            scale[at] = round(q + h * cache.key_width, cache.key_width, to) * scaling;
            std::fill(to + cache.key_width, to + stride, 0);
        }
    }

    void key(int t, const float* k) const {
        put(t, k, cache.key_width, cache.keys, cache.key_scale);
    }

    void value(int t, const float* v) const {
        put(t, v, cache.value_width, cache.values, cache.value_scale);
    }

    Queries queries() const { return {codes, scale, heads, cache.key_width}; }

  private:
    void put(int t, const float* x, int width, int16_t* to, float* to_scale) const {
        for (int h = 0; h < cache.kv_heads; h++) {
            const size_t at = size_t(step.slots[t]) * cache.kv_heads + h;
            to_scale[at] = round(x + h * width, width, to + at * width);
        }
    }

    float (*round)(const float*, int, int16_t*) = kernels().quantise16;
    const shoal_cache& cache;
    const shoal_step& step;
    const int heads, stride;
    const float scaling;
    int16_t* codes;
    float* scale;
};

class Layer {
  public:
    Layer(const shoal_layer& layer, const shoal_step& step, Memory& memory)
        : layer(layer), step(step), memory(memory) {}

    void attention(const float* x) {
        project(x);
        const Store store(layer.cache, layer.scores, step, layer.heads, memory);
        each_row(step.tokens, joined_width(), [&](int t, float*) { cache(store, t); });
        memory.seen.reserve(size_t(step.tokens) * layer.out->K * sizeof(float));
        attend(store.queries(), layer.cache, layer.scores, step, memory.seen.as<float>());
    }

    // Rows begin .. begin + rows of x go through the rest of the layer.
    void finish(float* x, int begin, int rows, int dtype) {
        float* here = x + size_t(begin) * layer.hidden;
        if (layer.qkv) output(here, begin, rows);
        if (layer.gate_up) feed_forward(here, rows, dtype);
    }

  private:
    int joined_width() const { return layer.qkv->N; }

    void normed_codes(const float* norm, double eps, const Linear& linear, const float* x, int t,
                      float* row) {
        e.norm(x + size_t(t) * layer.hidden, norm, eps, layer.hidden, row);
        set_row(linear, row, t, memory.codes);
    }

    void project(const float* x) {
        memory.joined.reserve(size_t(step.tokens) * joined_width() * sizeof(float));
        prepare(*layer.qkv, step.tokens, memory.codes);
        each_row(step.tokens, layer.hidden, [&](int t, float* row) {
            normed_codes(layer.attention_norm, layer.attention_eps, *layer.qkv, x, t, row);
        });
        run(*layer.qkv, memory.codes, memory.joined.as<float>(), size_t(joined_width()));
    }

    void cache(const Store& store, int t) const {
        const int width = layer.cache.key_width, kv_heads = layer.cache.kv_heads;
        float* q = memory.joined.as<float>() + size_t(t) * joined_width();
        float* k = q + layer.heads * width;
        norm_heads(q, layer.heads, layer.query_norm, layer.query_norm_length);
        norm_heads(k, kv_heads, layer.key_norm, layer.key_norm_length);
        rotate(q, layer.heads + kv_heads, t);
        store.query(t, q);
        store.key(t, k);
        store.value(t, k + kv_heads * width);
    }

    void norm_heads(float* x, int heads, const float* norm, int length) const {
        if (!norm) return;
        const int all = heads * layer.cache.key_width;
        for (float* end = x + all; x < end; x += length)
            e.norm(x, norm, layer.attention_eps, length, x);
    }

    void rotate(float* x, int heads, int t) const {
        const shoal_angles& angles = step.angles[layer.angles];
        const size_t at = size_t(t) * angles.half;
        for (int h = 0; h < heads; h++, x += layer.cache.key_width)
            e.rotate(x, x + angles.half, angles.cos + at, angles.sin + at, angles.half);
    }

    void output(float* x, int begin, int rows) {
        const float* seen = memory.seen.as<float>() + size_t(begin) * layer.out->K;
        quantise_for(*layer.out, seen, rows, memory.codes);
        memory.result.reserve(size_t(rows) * layer.hidden * sizeof(float));
        run(*layer.out, memory.codes, memory.result.as<float>(), size_t(layer.hidden));
        if (layer.gate_up) return;  // added there
        each_row(rows, layer.hidden, [&](int t, float*) {
            add_result(x, t, layer.attention_after, layer.attention_eps);
        });
    }

    void add_result(float* x, int t, const float* after, double eps) {
        float* result = memory.result.as<float>() + size_t(t) * layer.hidden;
        if (after) e.norm(result, after, eps, layer.hidden, result);
        e.add(x + size_t(t) * layer.hidden, result, layer.hidden);
    }

    void feed_forward(float* x, int rows, int dtype) {
        const int width = layer.down->K;
        prepare(*layer.gate_up, rows, memory.codes);
        each_row(rows, layer.hidden, [&](int t, float* row) {
            if (layer.qkv) add_result(x, t, layer.attention_after, layer.attention_eps);
            normed_codes(layer.mlp_norm, layer.mlp_eps, *layer.gate_up, x, t, row);
        });
        memory.wide.reserve(size_t(rows) * 2 * width * sizeof(float));
        run(*layer.gate_up, memory.codes, memory.wide.as<float>(), size_t(2 * width));
        activate(rows, width);
        memory.result.reserve(size_t(rows) * layer.hidden * sizeof(float));
        run(*layer.down, memory.codes, memory.result.as<float>(), size_t(layer.hidden));
        each_row(rows, layer.hidden, [&](int t, float*) {
            add_result(x, t, layer.mlp_after, layer.mlp_eps);
            round_row(x + size_t(t) * layer.hidden, dtype);
        });
    }

    void activate(int rows, int width) {
        prepare(*layer.down, rows, memory.codes);
        const auto act = layer.activation == SHOAL_SILU ? e.silu : e.gelu_tanh;
        each_row(rows, 2 * width, [&](int t, float* row) {
            const float* gate = memory.wide.as<float>() + size_t(t) * 2 * width;
            act(gate, gate + width, width, row);
            set_row(*layer.down, row, t, memory.codes);
        });
    }

    void round_row(float* x, int dtype) const {
        if (dtype == SHOAL_BF16) e.to_bf16(x, layer.hidden);
        if (dtype == SHOAL_F16) e.to_f16(x, layer.hidden);
    }

    const shoal_layer& layer;
    const shoal_step& step;
    Memory& memory;
    const Elementwise& e = elementwise();
};

bool valid(const shoal_cache& cache, int heads, const shoal_step& step) {
    if (cache.kv_heads <= 0 || heads <= 0 || heads % cache.kv_heads || cache.key_width <= 0 ||
        cache.key_width > MOST_WIDTH || cache.value_width <= 0 || cache.value_width > MOST_WIDTH)
        return false;
    int64_t tokens = 0;
    for (int row = 0; row < step.rows; row++) {
        if (step.start[row] < 0 || step.count[row] < 0) return false;
        tokens += step.count[row];
    }
    return step.page_size > 0 && tokens == step.tokens;
}

bool is_length(const float* norm, int length, int width, int heads) {
    return !norm || length == width || length == width * heads;
}

bool valid_attention(const shoal_layer& layer, const shoal_step& step) {
    const int width = layer.cache.key_width, heads = layer.heads, kv = layer.cache.kv_heads;
    return layer.out && layer.qkv->K == layer.hidden && layer.out->N == layer.hidden &&
           layer.attention_norm && width == layer.cache.value_width &&
           layer.qkv->N == (heads + 2 * kv) * width && layer.out->K == heads * width &&
           is_length(layer.query_norm, layer.query_norm_length, width, heads) &&
           is_length(layer.key_norm, layer.key_norm_length, width, kv) && layer.angles >= 0 &&
           layer.angles < step.tables && step.angles[layer.angles].half >= 0 &&
           2 * step.angles[layer.angles].half <= width && valid(layer.cache, heads, step);
}

bool valid_feed_forward(const shoal_layer& layer) {
    return layer.down && layer.mlp_norm && layer.gate_up->K == layer.hidden &&
           layer.down->N == layer.hidden && layer.gate_up->N == 2 * layer.down->K;
}

int check(const shoal_layer& layer, const shoal_step& step) {
    if (layer.qkv && !valid_attention(layer, step)) return SHOAL_BAD_ARGUMENT;
    if (layer.gate_up && !valid_feed_forward(layer)) return SHOAL_BAD_ARGUMENT;
    if (layer.qkv && !fits(layer.cache, layer.scores, step)) return SHOAL_OUT_OF_BOUNDS;
    return 0;
}

void run_layers(const shoal_layer* layers, int count, const shoal_step& step, float* x, int dtype) {
    for (int i = 0; i < count; i++) {
        Layer layer(layers[i], step, this_threads_memory());
        if (layers[i].qkv) layer.attention(x);
        for (int t = 0; t < step.tokens; t += ROWS_AT_ONCE)
            layer.finish(x, t, std::min(ROWS_AT_ONCE, step.tokens - t), dtype);
    }
}

void run_attention(const shoal_cache& cache, const shoal_scores& how, const shoal_step& step,
                   int heads, const float* q, const float* k, const float* v, float* out) {
    const Store store(cache, how, step, heads, this_threads_memory());
    const size_t query = size_t(heads) * cache.key_width;
    const size_t key = size_t(cache.kv_heads) * cache.key_width;
    const size_t value = size_t(cache.kv_heads) * cache.value_width;
    each_row(step.tokens, int(query + key + value), [&](int t, float*) {
        store.query(t, q + size_t(t) * query);
        store.key(t, k + size_t(t) * key);
        store.value(t, v + size_t(t) * value);
    });
    attend(store.queries(), cache, how, step, out);
}

}  // namespace
}  // namespace shoal

using namespace shoal;

int shoal_layers_run(const shoal_layer* layers, int count, const shoal_step* step, float* x,
                     int dtype) try {
    for (int i = 0; i < count; i++)
        if (const int error = check(layers[i], *step)) return error;
    run_layers(layers, count, *step, x, dtype);
    return 0;
} catch (const std::bad_alloc&) {
    return SHOAL_OUT_OF_MEMORY;
}

int shoal_attention(const shoal_cache* cache, const shoal_scores* how, const shoal_step* step,
                    int heads, const float* q, const float* k, const float* v, float* out) try {
    if (!valid(*cache, heads, *step)) return SHOAL_BAD_ARGUMENT;
    if (!fits(*cache, *how, *step)) return SHOAL_OUT_OF_BOUNDS;
    run_attention(*cache, *how, *step, heads, q, k, v, out);
    return 0;
} catch (const std::bad_alloc&) {
    return SHOAL_OUT_OF_MEMORY;
}

void shoal_rms_norm(const float* weight, double eps, const float* x, int T, int E, float* y) {
    const Elementwise& e = elementwise();
    each_row(T, E, [&](int t, float*) {
        e.norm(x + size_t(t) * E, weight, eps, E, y + size_t(t) * E);
    });
}

void shoal_norm_linear(const float* weight, double eps, const shoal_linear* linear, const float* x,
                       int T, float* y) {
    const Elementwise& e = elementwise();
    Codes& codes = this_threads_memory().codes;
    prepare(*linear, T, codes);
    each_row(T, linear->K, [&](int t, float* row) {
        e.norm(x + size_t(t) * linear->K, weight, eps, linear->K, row);
        set_row(*linear, row, t, codes);
    });
    run(*linear, codes, y, size_t(linear->N));
}
