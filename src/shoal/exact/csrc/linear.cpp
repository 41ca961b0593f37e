// Rows through packed weights, cut into chunks for the pool.

#include "linear.h"
#include "pool.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace shoal {
namespace {

constexpr int ROWS_AT_ONCE = 240;       // codes of so many rows stay in the second cache
constexpr int CHUNKS_A_THREAD = 8;      // small enough that a late thread costs little
constexpr int LEAST_CHUNK = 1 << 18;    // products; less is not worth claiming

int parts(int64_t total, int64_t size) { return int((total + size - 1) / size); }

// One task as a grid: blocks of rows times spans of panels (w16: spans of outputs).
struct Grid {
    int rows, row_blocks, units, unit_blocks;

    Grid(const Task& task, int64_t work_all, int width) {
        const Linear& linear = *task.linear;
        const int M = task.end - task.begin;
        units = linear.kind == Kind::w16 ? linear.N : linear.panels();
        row_blocks = parts(M, ROWS_AT_ONCE);
        rows = row_blocks ? parts(parts(M, row_blocks), width) * width : 0;
        row_blocks = M ? parts(M, rows) : 0;
        const int64_t work = int64_t(M) * linear.N * linear.inputs;
        const int64_t size = std::max<int64_t>(LEAST_CHUNK, work_all / (threads() * CHUNKS_A_THREAD));
        const int wanted = parts(work, size);
        unit_blocks = std::min(units, parts(wanted, std::max(1, row_blocks)));
    }
    int chunks() const { return row_blocks * unit_blocks; }
};

int panel_width(const Linear& linear, int panel) { return std::min(PANEL, linear.N - panel * PANEL); }

void finish_rows(const Task& task, int panel, int begin, int count, const int32_t* sums) {
    const Linear& linear = *task.linear;
    const int n = panel * PANEL, width = panel_width(linear, panel);
    const float* bias = linear.bias_or_null();
    for (int r = 0; r < count; r++)
        kernels().finish(sums + r * PANEL, linear.scale.as<float>() + n, bias ? bias + n : nullptr,
                         task.codes->row_scale(begin + r), width,
                         task.y + size_t(begin + r - task.begin) * task.ldy + n);
}

// Calls tile for rows begin .. end in nearly equal pieces of at most `most`.
template <class Tile>
void each_piece(const Task& task, int panel, int begin, int end, int most, Tile tile) {
    alignas(64) int32_t sums[MOST_ROWS * PANEL];
    for (int pieces = parts(end - begin, most); pieces > 0; pieces--) {
        const int count = parts(end - begin, pieces);
        tile(Rows{task.codes->row(begin), task.codes->stride, count}, sums);
        finish_rows(task, panel, begin, count, sums);
        begin += count;
    }
}

void multiply8(const Task& task, int panel, const int8_t* weights, int begin, int end) {
    const Kernels& k = kernels();
    const Linear& linear = *task.linear;
    const int32_t* offset = linear.offset.as<int32_t>() + panel * PANEL;
    each_piece(task, panel, begin, end, k.rows8, [&](Rows rows, int32_t* sums) {
        k.tile8(rows, weights, linear.inputs, offset, sums);
    });
}

void multiply4(const Task& task, int panel, int begin, int end) {
    const Kernels& k = kernels();
    const Linear& linear = *task.linear;
    if (end - begin > k.rows4) {
        static thread_local Bytes unpacked;
        unpacked.reserve(size_t(PANEL) * linear.inputs);
        k.unpack4(linear.panel4(panel), linear.inputs, unpacked.as<int8_t>());
        return multiply8(task, panel, unpacked.as<int8_t>(), begin, end);
    }
    const int32_t* offset = linear.offset.as<int32_t>() + panel * PANEL;
    each_piece(task, panel, begin, end, k.rows4, [&](Rows rows, int32_t* sums) {
        k.tile4(rows, linear.panel4(panel), linear.inputs, offset, sums);
    });
}

void multiply16(const Task& task, int n, int begin, int end) {
    const Linear& linear = *task.linear;
    const int16_t* w = linear.weights.as<int16_t>() + size_t(n) * linear.inputs;
    const float* bias = linear.bias_or_null();
    for (int m = begin; m < end; m++) {
        const auto* row = reinterpret_cast<const int16_t*>(task.codes->row(m));
        const float sum = float(kernels().dot16(row, w, linear.inputs));
        const float y = sum * linear.scale.as<float>()[n] * task.codes->row_scale(m);
        task.y[size_t(m - task.begin) * task.ldy + n] = bias ? y + bias[n] : y;
    }
}

void run_chunk(const Task& task, const Grid& grid, int chunk) {
    const int begin = task.begin + chunk / grid.unit_blocks * grid.rows;
    const int end = std::min(task.end, begin + grid.rows);
    const int64_t block = chunk % grid.unit_blocks;
    const int first = int(block * grid.units / grid.unit_blocks);
    const int last = int((block + 1) * grid.units / grid.unit_blocks);
    for (int unit = first; unit < last; unit++) switch (task.linear->kind) {
            case Kind::w8: multiply8(task, unit, task.linear->panel8(unit), begin, end); break;
            case Kind::w4: multiply4(task, unit, begin, end); break;
            case Kind::w16: multiply16(task, unit, begin, end); break;
        }
}

template <class T, class Quantise>
void quantise_all(const float* x, int M, int K, int padding, T zero, Codes& codes, Quantise one) {
    const int inputs = parts(K, padding) * padding;
    codes.M = M;
    codes.K = K;
    codes.stride = size_t(inputs) * sizeof(T);
    codes.codes.reserve(codes.stride * size_t(M));
    codes.scale.reserve(size_t(M) * sizeof(float));
    const int rows = std::max(1, (1 << 15) / K);
    parallel(parts(M, rows), [&](int chunk) {
        for (int m = chunk * rows; m < std::min(M, (chunk + 1) * rows); m++) {
            T* to = codes.codes.as<T>() + size_t(m) * inputs;
            codes.scale.as<float>()[m] = one(x + size_t(m) * K, K, to);
            std::fill(to + K, to + inputs, zero);
        }
    });
}

}  // namespace

void quantise_rows(const float* x, int M, int K, Codes& codes) {
    quantise_all<uint8_t>(x, M, K, GROUP, 128, codes, kernels().quantise);
}

void quantise_rows16(const float* x, int M, int K, Codes& codes) {
    quantise_all<int16_t>(x, M, K, BLOCK16, 0, codes, kernels().quantise16);
}

void quantise_for(const Linear& linear, const float* x, int M, Codes& codes) {
    if (linear.kind == Kind::w16) return quantise_rows16(x, M, linear.K, codes);
    quantise_rows(x, M, linear.K, codes);
}

void run(const Task* tasks, int count) {
    int64_t work = 0;
    for (int i = 0; i < count; i++)
        work += int64_t(tasks[i].end - tasks[i].begin) * tasks[i].linear->N * tasks[i].linear->inputs;
    static thread_local std::vector<Grid> kept_grids;
    static thread_local std::vector<int> kept_starts;
    std::vector<Grid>& grids = kept_grids;  // plain references: other threads read the caller's
    std::vector<int>& starts = kept_starts;
    grids.clear();
    starts.assign(1, 0);
    for (int i = 0; i < count; i++) {
        grids.emplace_back(tasks[i], work, kernels().rows8);
        starts.push_back(starts.back() + grids.back().chunks());
    }
    parallel(starts.back(), [&](int chunk) {
        const int i = int(std::upper_bound(starts.begin(), starts.end(), chunk) - starts.begin()) - 1;
        run_chunk(tasks[i], grids[size_t(i)], chunk - starts[size_t(i)]);
    });
}

}  // namespace shoal
