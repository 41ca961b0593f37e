// Rows through packed weights, cut into chunks for the pool.

#include "linear.h"
#include "pool.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace shoal {
namespace {

constexpr int ROWS_AT_ONCE = 240;       // codes of so many rows stay in the second cache
constexpr int INPUTS_AT_ONCE = 512;     // 16 KiB of weights stay in the first cache
constexpr int CHUNKS_A_THREAD = 16;     // small enough that a late thread costs little
constexpr int LEAST_CHUNK = 1 << 18;    // products; less is not worth claiming

int parts(int64_t total, int64_t size) { return int((total + size - 1) / size); }

// One task as a grid: blocks of rows times spans of panels (w16: spans of outputs).
struct Grid {
    int rows, row_blocks, units, unit_blocks;

    Grid(const Task& task, int64_t work_all, int width) {
        const Linear& linear = *task.linear;
        const int M = task.end - task.begin;
        units = linear.kind == Kind::w16 ? linear.N : linear.panels();
        const int blocks = std::max(1, parts(M, ROWS_AT_ONCE));
        rows = std::max(1, std::min(ROWS_AT_ONCE, parts(parts(M, blocks), width) * width));
        row_blocks = parts(M, rows);
        const int64_t work = int64_t(M) * linear.N * linear.inputs;
        const int64_t size = std::max<int64_t>(LEAST_CHUNK, work_all / (threads() * CHUNKS_A_THREAD));
        const int wanted = parts(work, size);
        unit_blocks = std::min(units, parts(wanted, std::max(1, row_blocks)));
    }
    int chunks() const { return row_blocks * unit_blocks; }
};

// Sums begin at minus 128 * (sum of weights) where the kernels take codes without a sign.
void begin_sums(const int32_t* offset, int rows, int32_t* sums) {
    const bool is_signed = kernels().is_signed;
    for (int n = 0; n < PANEL; n++) sums[n] = is_signed ? 0 : int32_t(0u - uint32_t(offset[n]));
    for (int r = 1; r < rows; r++) memcpy(sums + r * PANEL, sums, PANEL * sizeof(int32_t));
}

void finish_sums(const Task& task, int panel, int begin, int end, const int32_t* sums) {
    const Linear& linear = *task.linear;
    const int n = panel * PANEL, width = std::min(PANEL, linear.N - n);
    const float* bias = linear.bias_or_null();
    for (int m = begin; m < end; m++, sums += PANEL)
        kernels().finish(sums, linear.scale.as<float>() + n, bias ? bias + n : nullptr,
                         task.codes->row_scale(m), width,
                         task.y + size_t(m - task.begin) * task.ldy + n);
}

// tile(rows, sums) for all rows in nearly equal pieces of at most `most`.
template <class Tile>
void each_piece(Rows rows, int most, int32_t* sums, Tile tile) {
    for (int pieces = parts(rows.count, most); pieces > 0; pieces--) {
        const int count = parts(rows.count, pieces);
        tile(Rows{rows.codes, rows.stride, count}, sums);
        rows.codes += size_t(count) * rows.stride;
        rows.count -= count;
        sums += count * PANEL;
    }
}

// Block after block of inputs: its weights stay in the first cache for all rows.
void add_panel8(const Linear& linear, int panel, Rows rows, int32_t* sums) {
    const Kernels& kernel = kernels();
    const int block = rows.count <= kernel.rows8 ? linear.inputs : INPUTS_AT_ONCE;
    for (int k = 0; k < linear.inputs; k += block, rows.codes += block)
        each_piece(rows, kernel.rows8, sums, [&](Rows piece, int32_t* to) {
            const int inputs = std::min(block, linear.inputs - k);
            kernel.tile8(piece, linear.panel8(panel) + k * PANEL, inputs, to);
        });
}

void add_panel4(const Linear& linear, int panel, Rows rows, int32_t* sums) {
    const Kernels& kernel = kernels();
    const Panel4 all = linear.panel4(panel);
    if (rows.count <= kernel.direct4)
        return each_piece(rows, kernel.rows4, sums, [&](Rows piece, int32_t* to) {
            kernel.tile4(piece, all, linear.inputs, to);
        });
    alignas(64) int8_t unpacked[INPUTS_AT_ONCE * PANEL];
    for (int k = 0; k < linear.inputs; k += INPUTS_AT_ONCE, rows.codes += INPUTS_AT_ONCE) {
        const int inputs = std::min(INPUTS_AT_ONCE, linear.inputs - k);
        const Panel4 block = {all.nibbles + k * (PANEL / 2), all.multipliers + k, all.lut};
        kernel.unpack4(block, inputs, unpacked);
        each_piece(rows, kernel.rows8, sums, [&](Rows piece, int32_t* to) {
            kernel.tile8(piece, unpacked, inputs, to);
        });
    }
}

void multiply(const Task& task, int panel, int begin, int end) {
    const Linear& linear = *task.linear;
    alignas(64) int32_t sums[ROWS_AT_ONCE * PANEL];
    const Rows rows = {task.codes->row(begin), task.codes->stride, end - begin};
    begin_sums(linear.offset.as<int32_t>() + panel * PANEL, rows.count, sums);
    const auto add = linear.kind == Kind::w8 ? add_panel8 : add_panel4;
    add(linear, panel, rows, sums);
    finish_sums(task, panel, begin, end, sums);
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
    const auto one = task.linear->kind == Kind::w16 ? multiply16 : multiply;
    for (int unit = first; unit < last; unit++) one(task, unit, begin, end);
}

template <class T, class Quantise>
void quantise_all(const float* x, int M, int K, int padding, T zero, Codes& codes, Quantise one) {
    const int inputs = parts(K, padding) * padding;
    codes.M = M;
    codes.K = K;
    codes.stride = (size_t(inputs) * sizeof(T) + 63) / 64 * 64;
    if (codes.stride % 128 == 0) codes.stride += 64;  // an odd number of lines: rows do not collide
    codes.codes.reserve(codes.stride * size_t(M));
    codes.scale.reserve(size_t(M) * sizeof(float));
    const int rows = std::max(1, (1 << 15) / K);
    parallel(parts(M, rows), [&](int chunk) {
        for (int m = chunk * rows; m < std::min(M, (chunk + 1) * rows); m++) {
            T* to = reinterpret_cast<T*>(codes.codes.as<char>() + size_t(m) * codes.stride);
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
