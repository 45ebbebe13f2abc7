"""What a threadgroup of the first pass takes: which keys, and which two rows each lane.

Both bodies of that pass begin with these words, behind what they call `local`, the first of their
rows in the threadgroup.
"""

from __future__ import annotations

__all__ = ["SHARE"]

SHARE = """\
  const int queries = q_shape[2];
  const int allocated = k_shape[2];
  const int rows = Hq / Hkv * queries;
  const int most = (allocated + LEAST * BN - 1) / (LEAST * BN);
  const int splits = most < SPLITS ? most : SPLITS;
  const int split = static_cast<int>(threadgroup_position_in_grid.x);
  const int pair = static_cast<int>(threadgroup_position_in_grid.z);  // row of the batch, key head
  int length = lengths[pair / Hkv];
  length = length < allocated ? length : allocated;
  const int oldest = WINDOW > 0 ? length - queries - WINDOW + 1 : 0;
  const int first = oldest > 0 ? oldest : 0;
  const int tiles = length > first ? (length - first + BN - 1) / BN : 0;
  const int begin = first + tiles * split / splits * BN;
  const int stop = first + tiles * (split + 1) / splits * BN;
  const int end = stop < length ? stop : length;

  const int row0 = static_cast<int>(threadgroup_position_in_grid.y) * RT + local;
  const int row1 = row0 + 8;
  const int from0 = row0 < rows ? row0 : rows - 1;
  const int from1 = row1 < rows ? row1 : rows - 1;
  const size_t base = static_cast<size_t>(pair) * rows;
"""
