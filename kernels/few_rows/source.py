"""The kernel body of a product of few rows, in CUDA.

A threadgroup takes 16 RT rows of the matrix; its simdgroups share out the columns in chunks of 32
and add their sums up in threadgroup memory. Tiles are those of ``mma.sync`` (16 x 8 x 16), the
matrix on the left. A lane loads 16 bytes of a row at once, eight neighbouring columns: the columns
of a chunk are summed in another order than the tile names them, the same for both factors. The
matrix is read once and past the caches; what costs time is that, not the products.
"""

from __future__ import annotations

import attrs

__all__ = ["Product"]

_BODY = """
  constexpr int OUTPUTS = 16 * RT;
  constexpr int PAD = 8 * MT + 1;
  const int ND = w_shape[0];
  const int KD = w_shape[1];
  const int CHUNKS = KD / 32;
  const int M = @ROWS@;
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int simd = static_cast<int>(simdgroup_index_in_threadgroup);
  const int row = lane / 4;
  const int column = lane % 4 * 8;
  const int first = static_cast<int>(threadgroup_position_in_grid.x) * OUTPUTS;
  threadgroup float parts[SIMDS][OUTPUTS][PAD];
  float sums[RT][MT][4];
  UNROLL
  for (int i = 0; i < RT; ++i) {
    UNROLL
    for (int t = 0; t < MT; ++t) {
      sums[i][t][0] = sums[i][t][1] = sums[i][t][2] = sums[i][t][3] = 0.0f;
    }
  }
  const CT* weights = w + static_cast<size_t>(first + row) * KD + column;
  const CT* mine[MT];
  UNROLL
  for (int t = 0; t < MT; ++t) {
    const int m = 8 * t + row;
    mine[t] = x + (m < M ? m : M - 1) * KD + column;
  }
  for (int c0 = simd * AHEAD; c0 < CHUNKS; c0 += SIMDS * AHEAD) {
    uint4 a[AHEAD][RT][2];
    uint4 b[AHEAD][MT];
    UNROLL
    for (int u = 0; u < AHEAD; ++u) {
      if (c0 + u < CHUNKS) {
        UNROLL
        for (int i = 0; i < RT; ++i) {
          const CT* from = weights + static_cast<size_t>(16 * i) * KD + (c0 + u) * 32;
          a[u][i][0] = __ldcs(reinterpret_cast<const uint4*>(from));
          a[u][i][1] = __ldcs(reinterpret_cast<const uint4*>(from + 8 * KD));
        }
        UNROLL
        for (int t = 0; t < MT; ++t) {
          b[u][t] = __ldg(reinterpret_cast<const uint4*>(mine[t] + (c0 + u) * 32));
        }
      }
    }
    UNROLL
    for (int u = 0; u < AHEAD; ++u) {
      if (c0 + u < CHUNKS) {
        UNROLL
        for (int i = 0; i < RT; ++i) {
          const uint4 above = a[u][i][0];
          const uint4 below = a[u][i][1];
          const unsigned int low[4] = {above.x, below.x, above.y, below.y};
          const unsigned int high[4] = {above.z, below.z, above.w, below.w};
          UNROLL
          for (int t = 0; t < MT; ++t) {
            mma_16x8x16<KIND>(sums[i][t], low, b[u][t].x, b[u][t].y);
            mma_16x8x16<KIND>(sums[i][t], high, b[u][t].z, b[u][t].w);
          }
        }
      }
    }
  }
  UNROLL
  for (int i = 0; i < RT; ++i) {
    UNROLL
    for (int t = 0; t < MT; ++t) {
      UNROLL
      for (int e = 0; e < 4; ++e) {
        parts[simd][16 * i + row + e / 2 * 8][8 * t + lane % 4 * 2 + e % 2] = sums[i][t][e];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = simd * 32 + lane; j < OUTPUTS * M; j += 32 * SIMDS) {
    const int n = j % OUTPUTS;
    const int m = j / OUTPUTS;
    float sum = 0.0f;
    UNROLL
    for (int p = 0; p < SIMDS; ++p) {
      sum += parts[p][n][m];
    }
    y[static_cast<size_t>(m) * ND + first + n] = static_cast<CT>(sum);
  }
"""


@attrs.frozen
class Product:
    """The product.

    Attributes:
        dimensions: of x. How many rows it has is not part of the kernel, but for their tiles.
    """

    dimensions: int = 3

    name = "draftloom_few_rows"

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return ["x", "w"]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        return ["y"]

    @property
    def source(self) -> str:
        """The body, as handed to MLX."""
        rows = " * ".join(f"x_shape[{i}]" for i in range(self.dimensions - 1))
        return _BODY.replace("@ROWS@", rows)
