// Cuts attention into pieces for the pool: some queries of one row that share a kv head, against
// their context, block by block. With few pieces and a long context the blocks are shared out too.

#include "attention.h"

#include "linear.h"
#include "pool.h"

#include <algorithm>
#include <vector>

namespace shoal {
namespace {

constexpr int MOST_QUERIES = 64;           // of one piece, about
constexpr int FEW_QUERIES = 16;            // of one head; fewer take all heads in one piece
constexpr int64_t MOST_SCORES = 1 << 17;   // of one piece, about: they stay in the second cache
constexpr int64_t LITTLE_WORK = 1 << 19;   // products; less is done by one thread sooner
constexpr int SHARED_BLOCKS = 4;           // a context of fewer is not shared out
const int16_t ZEROS[MOST_WIDTH] = {};

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

struct Piece {
    int row;
    int head, heads;      // of keys and values
    int64_t first_token;  // of all rows' new tokens
    int64_t position;     // of that token
    int64_t tokens;
};

// Everything about one piece that its blocks share.
class Tile {
  public:
    Tile(const Queries& queries, const shoal_cache& cache, const shoal_scores& how,
         const shoal_step& step, const Piece& piece, const AttentionKernels& kernels, Bytes& memory)
        : cache(cache), piece(piece), group(queries.heads / cache.kv_heads),
          of_head(int(piece.tokens) * group), rows(of_head * piece.heads), how(how),
          kernels(kernels), stride(Queries::stride(cache.key_width)) {
        low = how.window ? std::max<int64_t>(0, piece.position - how.window + 1) : 0;
        high = piece.position + piece.tokens;
        first = low / ATTENTION_BLOCK * ATTENTION_BLOCK;
        blocks = int(parts(high - first, ATTENTION_BLOCK));
        carve(memory);
        copy_queries(queries);
        find_slots(step);
    }

    // Scores of all queries with the tokens of one block.
    void score(int block) {
        const int64_t begin = int64_t(block) * ATTENTION_BLOCK;
        for (int64_t at = begin; at < begin + lanes(block); at += LANES)
            for (int head = 0; head < piece.heads; head++) score_lanes(at, head);
    }

    void find_highest() {
        for (int r = 0; r < rows; r++) {
            const int n = (blocks - 1) * ATTENTION_BLOCK + lanes(blocks - 1);
            highest[r] = kernels.highest(scores_of(r), n);
            if (how.sinks) highest[r] = std::max(highest[r], sink(r));
        }
    }

    // Adds one block's values, weighted, to out (rows, W), and its weights to totals (rows).
    void weigh(int block, float* out, int64_t* totals) {
        for (int head = 0; head < piece.heads; head++) weigh_head(block, head, out, totals);
    }

    // Divides by the sum of weights; all_out is (T, H, W).
    void finish(float* all_out) {
        const size_t width = size_t(cache.value_width);
        for (int r = 0; r < rows; r++) {
            const int64_t of_sink = how.sinks ? kernels.weight_of(sink(r), highest[r]) : 0;
            kernels.divide(out + r * width, totals[r] + of_sink, cache.value_width);
            std::copy_n(out + r * width, width, all_out + query(r) * width);
        }
    }

    const shoal_cache& cache;
    const Piece piece;
    const int group, of_head, rows;  // rows: queries, head by head, then token by token
    int blocks;
    float* out;       // (rows, W)
    int64_t* totals;  // (rows)

  private:
    void carve(Bytes& memory) {
        const size_t R = size_t(rows), width = size_t(cache.value_width);
        const size_t scores_size = R * size_t(blocks) * ATTENTION_BLOCK;
        const size_t tokens = size_t(blocks) * ATTENTION_BLOCK;
        memory.reserve((R + tokens) * 8 + (scores_size + R * 2 + R * width) * 4 +
                       R * size_t(stride) * 2);
        totals = memory.as<int64_t>();
        entries = totals + R;
        scores = reinterpret_cast<float*>(entries + tokens);
        highest = scores + scores_size;
        scale = highest + R;
        out = scale + R;
        codes = reinterpret_cast<int16_t*>(out + R * width);
        std::fill_n(totals, R, 0);
        std::fill_n(out, R * width, 0.f);
    }

    // Where a row's query is among all of the step.
    size_t query(int r) const {
        const int64_t head = (piece.head + r / of_head) * group + r % group;
        return size_t((piece.first_token + r % of_head / group) * cache.kv_heads * group + head);
    }

    void copy_queries(const Queries& queries) {
        for (int r = 0; r < rows; r++) {
            std::copy_n(queries.codes + query(r) * stride, stride, codes + size_t(r) * stride);
            scale[r] = queries.scale[query(r)];
        }
    }

    float* scores_of(int r) { return scores + size_t(r) * blocks * ATTENTION_BLOCK; }

    float sink(int r) const { return how.sinks[(piece.head + r / of_head) * group + r % group]; }

    // How many of a block's tokens are computed: those up to the last that is seen, in whole lanes.
    int lanes(int block) const {
        const int64_t left = high - first - int64_t(block) * ATTENTION_BLOCK;
        return int(std::min<int64_t>(ATTENTION_BLOCK, parts(left, LANES) * LANES));
    }

    // Where in the pools each token's first head lies, from the first block on; -1: never seen.
    void find_slots(const shoal_step& step) {
        const int64_t* pages = step.pages + step.page_begin[piece.row];
        const int64_t size = step.page_size;
        std::fill(entries, entries + (low - first), -1);
        for (int64_t at = low; at < high;) {
            const int64_t page = at / size, end = std::min(high, (page + 1) * size);
            int64_t entry = (pages[page] * size + at % size) * cache.kv_heads + piece.head;
            for (; at < end; at++, entry += cache.kv_heads) entries[at - first] = entry;
        }
        std::fill(entries + (high - first), entries + int64_t(blocks) * ATTENTION_BLOCK, -1);
    }

    // How many rows of a head to take at once from r on, in nearly equal parts.
    int at_once(int r) const {
        const int left = of_head - r % of_head;
        return int(parts(left, parts(left, kernels.rows)));
    }

    void score_lanes(int64_t at, int head) {
        static thread_local Bytes memory;
        memory.reserve(size_t(stride / 2) * LANES * 4);
        auto* panel = memory.as<int32_t>();
        alignas(64) float key_scale[LANES];
        pack_keys(at, head, panel, key_scale);
        alignas(64) int32_t sums[16 * LANES];
        for (int r = head * of_head, count; r < (head + 1) * of_head; r += count) {
            count = at_once(r);
            kernels.products(codes + size_t(r) * stride, size_t(stride), count, panel, stride / 2,
                             sums);
            for (int i = r; i < r + count; i++)
                finish_scores(i, first + at, sums + (i - r) * LANES, key_scale, scores_of(i) + at);
        }
    }

    void finish_scores(int r, int64_t position, const int32_t* sums, const float* key_scale,
                       float* to) {
        const int64_t own = piece.position + r % of_head / group;
        const int64_t begin = how.window ? own - how.window + 1 - position : 0;
        const int end = int(std::clamp<int64_t>(own + 1 - position, 0, LANES));
        kernels.score(sums, key_scale, scale[r], how.softcap,
                      int(std::clamp<int64_t>(begin, 0, LANES)), end, to);
    }

    void weigh_head(int block, int head, float* out, int64_t* totals) {
        static thread_local Bytes memory;
        const int n = lanes(block), width = cache.value_width, panels = int(parts(width, LANES));
        const size_t panel_size = ATTENTION_BLOCK / 2 * LANES, R = size_t(of_head);
        memory.reserve(panels * panel_size * 4 + R * (ATTENTION_BLOCK * 2 + 4));
        auto* pairs = memory.as<int32_t>();
        auto* codes = reinterpret_cast<int16_t*>(pairs + panels * panel_size);
        auto* scale = reinterpret_cast<float*>(codes + R * ATTENTION_BLOCK);
        const int64_t at = int64_t(block) * ATTENTION_BLOCK;
        alignas(64) float value_scale[ATTENTION_BLOCK];
        pack_values(at, head, n, pairs, panel_size, value_scale);
        const int begin = head * of_head;
        for (int i = 0; i < of_head; i++) {
            float* weights = scores_of(begin + i) + at;
            totals[begin + i] += kernels.weigh(weights, highest[begin + i], value_scale, n);
            scale[i] = kernels.encode(weights, n, codes + i * ATTENTION_BLOCK);
        }
        for (int panel = 0; panel < panels; panel++)
            add_panel(codes, scale, pairs + panel * panel_size, n,
                      std::min(LANES, width - panel * LANES),
                      out + size_t(begin) * width + panel * LANES);
    }

    void add_panel(const int16_t* codes, const float* scale, const int32_t* pairs, int n, int width,
                   float* out) const {
        alignas(64) int32_t sums[16 * LANES];
        for (int r = 0, count; r < of_head; r += count) {
            count = at_once(r);
            kernels.products(codes + r * ATTENTION_BLOCK, ATTENTION_BLOCK, count, pairs, n / 2,
                             sums);
            for (int i = 0; i < count; i++)
                kernels.add(out + size_t(r + i) * cache.value_width, sums + i * LANES, scale[r + i],
                            width);
        }
    }

    void pack_keys(int64_t at, int head, int32_t* panel, float* key_scale) const {
        const int16_t* tokens[LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t entry = entries[at + i] + head;
            const bool there = entries[at + i] >= 0;
            tokens[i] = there ? cache.keys + entry * cache.key_width : ZEROS;
            key_scale[i] = there ? cache.key_scale[entry] : 0.f;
        }
        kernels.pack_keys(tokens, cache.key_width, panel);
    }

    void pack_values(int64_t at, int head, int n, int32_t* pairs, size_t panel_size,
                     float* value_scale) const {
        const int16_t* tokens[ATTENTION_BLOCK];
        for (int i = 0; i < n; i++) {
            const int64_t entry = entries[at + i] + head;
            const bool there = entries[at + i] >= 0;
            tokens[i] = there ? cache.values + entry * cache.value_width : ZEROS;
            value_scale[i] = there ? cache.value_scale[entry] : 0.f;
        }
        kernels.pack_values(tokens, n, cache.value_width, pairs, panel_size);
    }

    const shoal_scores& how;
    const AttentionKernels& kernels;
    const int stride;
    int64_t low, high;  // positions that any of the queries sees: low .. high - 1
    int64_t first;      // of the first block
    int64_t* entries;   // (blocks * 128), see find_slots
    float *scores, *highest, *scale;
    int16_t* codes;
};

void run_alone(Tile& tile, float* out) {
    for (int block = 0; block < tile.blocks; block++) tile.score(block);
    tile.find_highest();
    for (int block = 0; block < tile.blocks; block++) tile.weigh(block, tile.out, tile.totals);
    tile.finish(out);
}

// The same, with the blocks shared among the threads and added in their order afterwards.
void run_together(Tile& tile, float* out) {
    static thread_local Bytes memory;
    const size_t rows = size_t(tile.rows), size = rows * size_t(tile.cache.value_width);
    memory.reserve(size_t(tile.blocks) * (rows * 8 + size * 4));
    auto* totals = memory.as<int64_t>();
    auto* sums = reinterpret_cast<float*>(totals + size_t(tile.blocks) * rows);
    std::fill_n(totals, size_t(tile.blocks) * rows, 0);
    std::fill_n(sums, size_t(tile.blocks) * size, 0.f);
    parallel(tile.blocks, [&](int block) { tile.score(block); });
    tile.find_highest();
    parallel(tile.blocks, [&](int block) {
        tile.weigh(block, sums + size_t(block) * size, totals + size_t(block) * rows);
    });
    for (size_t block = 0; block < size_t(tile.blocks); block++) {
        for (size_t i = 0; i < size; i++) tile.out[i] += sums[block * size + i];
        for (size_t r = 0; r < rows; r++) tile.totals[r] += totals[block * rows + r];
    }
    tile.finish(out);
}

int64_t tokens_of_a_piece(int64_t context, int group) {
    const int64_t most = MOST_SCORES / std::max<int64_t>(1, context);
    return std::max<int64_t>(1, std::min<int64_t>(MOST_QUERIES, most) / group);
}

// How much of a context some tokens at its end see together.
int64_t seen(const shoal_scores& how, int64_t context, int64_t tokens) {
    return how.window ? std::min(context, how.window + tokens) : context;
}

// The longest first, so that no thread is left with one at the end.
void list_pieces(const shoal_cache& cache, const shoal_scores& how, const shoal_step& step,
                 int group, std::vector<Piece>& pieces) {
    pieces.clear();
    int64_t first_token = 0;
    for (int row = 0; row < step.rows; row++) {
        const int64_t start = step.start[row], count = step.count[row];
        const bool small = step.rows >= 4 * threads() && count * group <= FEW_QUERIES;
        const int heads = small ? cache.kv_heads : 1;  // all that lies at one place in memory
        const int64_t context = seen(how, start + count, MOST_QUERIES);
        const int64_t most = tokens_of_a_piece(context, group * heads);
        for (int64_t at = (count - 1) / most * most; at >= 0 && count; at -= most)
            for (int head = 0; head < cache.kv_heads; head += heads)
                pieces.push_back({row, head, heads, first_token + at, start + at,
                                  std::min(most, count - at)});
        first_token += count;
    }
}

struct Work {
    int64_t all = 0, longest = 0;  // products; tokens of context
    Work(const shoal_cache& cache, const shoal_scores& how, int group,
         const std::vector<Piece>& pieces) {
        for (const Piece& piece : pieces) {
            const int64_t context = seen(how, piece.position + piece.tokens, piece.tokens);
            const int64_t queries = (piece.tokens * group + 8) * piece.heads;  // 8: packing
            all += context * (cache.key_width + cache.value_width) * queries;
            longest = std::max(longest, context);
        }
    }
};

}  // namespace

void attend(const Queries& queries, const shoal_cache& cache, const shoal_scores& how,
            const shoal_step& step, float* out) {
    static thread_local std::vector<Piece> kept;
    std::vector<Piece>& pieces = kept;  // a plain reference: other threads read the caller's
    const AttentionKernels& kernels = attention_kernels();
    const int group = queries.heads / cache.kv_heads;
    list_pieces(cache, how, step, group, pieces);
    const auto run = [&](int i, auto how_to_run) {
        static thread_local Bytes memory;
        Tile tile(queries, cache, how, step, pieces[size_t(i)], kernels, memory);
        how_to_run(tile, out);
    };
    const int count = int(pieces.size());
    const Work work(cache, how, group, pieces);
    if (work.all < LITTLE_WORK) {
        for (int i = 0; i < count; i++) run(i, run_alone);
    } else if (count < 2 * threads() && work.longest > SHARED_BLOCKS * ATTENTION_BLOCK) {
        for (int i = 0; i < count; i++) run(i, run_together);
    } else {
        parallel(count, [&](int i) { run(i, run_alone); });
    }
}

bool fits(const shoal_cache& cache, const shoal_scores& how, const shoal_step& step) {
    const auto inside = [&](int64_t slot) { return slot >= 0 && slot < cache.slots; };
    for (int t = 0; t < step.tokens; t++)
        if (!inside(step.slots[t])) return false;
    for (int row = 0; row < step.rows; row++) {
        const int64_t size = step.page_size, start = step.start[row], end = start + step.count[row];
        const int64_t low = how.window ? std::max<int64_t>(0, start - how.window + 1) : 0;
        if (step.count[row] == 0) continue;
        const int64_t* pages = step.pages + step.page_begin[row];
        const int64_t known = step.page_begin[row + 1] - step.page_begin[row];
        if ((end - 1) / size >= known) return false;
        for (int64_t page = low / size; page <= (end - 1) / size; page++) {
            const int64_t from = std::max(low, page * size), to = std::min(end, (page + 1) * size);
            if (!inside(pages[page] * size + from % size)) return false;
            if (!inside(pages[page] * size + (to - 1) % size)) return false;
        }
    }
    return true;
}

}  // namespace shoal
