// Compiled once per SIMD level; see simd.h and winograd_kernel.h.
#include "cpu/winograd_kernel.h"

#include "cpu/simd_matrix.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

constexpr int64_t kPanel = kPanelVectors * kLanes;
// Of a product's depth at a time: that much of a panel of weights stays in the first-level cache while all
// rows pass.
constexpr int64_t kDepth = 128;

/// From one position's numbers to the next one's: not a power of two apart, or all 16 would fall in the same
/// sets of a cache.
static int64_t position_stride(int64_t tiles, int64_t channels) {
    return tiles * channels + 16;
}

/// packed: [position][panel][in][output of the panel], G g G^T of every 3 x 3 kernel g.
template <typename Element>
static void pack(const Element* weight, int64_t in, int64_t out, Real* packed) {
    for (int64_t first = 0; first < out; first += kPanel) {
        const int64_t wide = out - first < kPanel ? out - first : kPanel;
        for (int64_t k = 0; k < in; ++k)
            for (int64_t n = 0; n < wide; ++n) {
                const Element* g = weight + ((first + n) * in + k) * 9;
                double half[kWinogradSide][3];  // G g
                for (int j = 0; j < 3; ++j) {
                    const double top = widen(g[j]), middle = widen(g[3 + j]), bottom = widen(g[6 + j]);
                    half[0][j] = top;
                    half[1][j] = (top + middle + bottom) / 2;
                    half[2][j] = (top - middle + bottom) / 2;
                    half[3][j] = bottom;
                }
                Real* to = packed + first * in + k * wide + n;
                for (int i = 0; i < kWinogradSide; ++i) {
                    const double left = half[i][0], middle = half[i][1], right = half[i][2];
                    const double row[kWinogradSide] = {left, (left + middle + right) / 2,
                                                       (left - middle + right) / 2, right};
                    for (int j = 0; j < kWinogradSide; ++j)
                        to[(i * kWinogradSide + j) * in * out] = static_cast<Real>(row[j]);
                }
            }
    }
}

/// A tile's place.
struct Place {
    int64_t image, y, x;  // y, x: of its first output
};

template <typename Element>
static inline Place place_of(const WinogradConvolution<Element>& c, int64_t tile) {
    const int64_t down = (c.height + 1) / kWinogradTile, across = (c.width + 1) / kWinogradTile;
    return {tile / (down * across), tile / across % down * kWinogradTile, tile % across * kWinogradTile};
}

/// B^T d of four numbers.
static inline void to_products(const Vec d[kWinogradSide], Vec to[kWinogradSide]) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[1] - d[3];
}

/// One tile's 16 positions of every channel, `stride` numbers from one to the next.
template <typename Element>
static inline void read_tile(const WinogradConvolution<Element>& c, int64_t tile, Real* to, int64_t stride) {
    const Place at = place_of(c, tile);
    const Element* pixels[kWinogradSide][kWinogradSide];  // null: padding
    for (int i = 0; i < kWinogradSide; ++i)
        for (int j = 0; j < kWinogradSide; ++j) {
            const int64_t y = at.y + i - 1, x = at.x + j - 1;
            const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
            pixels[i][j] = inside ? c.x.data + at.image * c.x.image + y * c.x.row + x * c.x.pixel : nullptr;
        }
    for (int64_t k = 0; k < c.in; k += kLanes) {
        Vec half[kWinogradSide][kWinogradSide];  // of each column: B^T d
        for (int j = 0; j < kWinogradSide; ++j) {
            Vec column[kWinogradSide];
            for (int i = 0; i < kWinogradSide; ++i)
                column[i] = pixels[i][j] ? load(pixels[i][j] + k) : broadcast(Real{0});
            to_products(column, half[j]);
        }
        for (int i = 0; i < kWinogradSide; ++i) {
            const Vec row[kWinogradSide] = {half[0][i], half[1][i], half[2][i], half[3][i]};
            Vec found[kWinogradSide];
            to_products(row, found);
            for (int j = 0; j < kWinogradSide; ++j)
                store(to + (i * kWinogradSide + j) * stride + k, found[j]);
        }
    }
}

template <typename Element>
static void multiply_position(const WinogradConvolution<Element>& p, int64_t tiles, int64_t position,
                              int64_t first_panel, int64_t last_panel, const Real* numbers, Real* products) {
    const Real* weights = p.weight + position * p.in * p.out;
    for (int64_t index = first_panel; index < last_panel; ++index) {
        const int64_t first = index * kPanel, wide = p.out - first < kPanel ? p.out - first : kPanel;
        multiply_panel(wide / kLanes, tiles, p.in, numbers, p.in, weights + first * p.in, products + first,
                       p.out);
    }
}

/// A^T m of four numbers.
static inline void to_outputs(const Vec m[kWinogradSide], Vec to[kWinogradTile]) {
    to[0] = m[0] + m[1] + m[2];
    to[1] = m[1] - m[2] - m[3];
}

/// One tile's outputs of every channel.
template <typename Element>
static inline void write_tile(const WinogradConvolution<Element>& c, int64_t tile, const Real* from,
                              int64_t stride) {
    const Place at = place_of(c, tile);
    for (int64_t n = 0; n < c.out; n += kLanes) {
        Vec half[kWinogradSide][kWinogradTile];  // of each column: A^T m
        for (int j = 0; j < kWinogradSide; ++j) {
            Vec column[kWinogradSide];
            for (int i = 0; i < kWinogradSide; ++i)
                column[i] = load(from + (i * kWinogradSide + j) * stride + n);
            to_outputs(column, half[j]);
        }
        const Vec bias = c.bias ? load(c.bias + n) : broadcast(Real{0});
        for (int i = 0; i < kWinogradTile; ++i) {
            const int64_t y = at.y + i;
            if (y >= c.height) break;
            const Vec row[kWinogradSide] = {half[0][i], half[1][i], half[2][i], half[3][i]};
            Vec found[kWinogradTile];
            to_outputs(row, found);
            for (int j = 0; j < kWinogradTile; ++j) {
                const int64_t x = at.x + j;
                if (x >= c.width) break;
                Vec value = found[j] + bias;
                if (c.residual.data)
                    value = value + load(c.residual.data + at.image * c.residual.image + y * c.residual.row +
                                         x * c.residual.pixel + n);
                // maximum(a, b) is b where a is NaN: a NaN stays one.
                if (c.rectify) value = maximum(broadcast(Real{0}), value);
                store(c.y.data + at.image * c.y.image + y * c.y.row + x * c.y.pixel + n, value);
            }
        }
    }
}

template <typename Element>
static void read(const WinogradConvolution<Element>& c, int64_t first, int64_t tiles, Real* numbers,
                 int64_t stride) {
    for (int64_t t = 0; t < tiles; ++t) read_tile(c, first + t, numbers + t * c.in, stride);
}

template <typename Element>
static void write(const WinogradConvolution<Element>& c, int64_t first, int64_t tiles, const Real* products,
                  int64_t stride) {
    for (int64_t t = 0; t < tiles; ++t) write_tile(c, first + t, products + t * c.out, stride);
}

template <typename Element>
const WinogradKernels<Element>& winograd_kernels() {
    static const WinogradKernels<Element> kernels = {
        kLanes,        pack<Element>, kPanel, position_stride, read<Element>, multiply_position<Element>,
        write<Element>};
    return kernels;
}

MAGNET_FAST_INSTANTIATE_KERNELS(WinogradKernels, winograd_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
