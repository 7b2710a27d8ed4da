//! The inner loop of the matrix products: a tile of sums in registers.

use super::real::{Real, Vector};

/// Rows of a tile, side by side in memory: `left` is [depth, STRIP].
pub(super) const STRIP: usize = 8;
/// Vectors side by side of the widest tile, and their length in `f32`: 16 registers of 32.
const VECTORS: usize = 2;
pub(super) const WIDEST_PANEL: usize = 32;

/// Columns of a tile: `right` is [depth, panel]. One vector, two where there are 32 registers.
#[inline(always)]
pub(super) const fn panel<V: Vector>() -> usize {
    if V::COUNT == WIDEST_PANEL / VECTORS { WIDEST_PANEL } else { V::COUNT }
}

/// out[i][j] = sum over k of left[k][i] right[k][j], where out is [STRIP, panel].
#[inline(always)]
pub(super) fn tile<V: Vector>(left: &[V::Scalar], right: &[V::Scalar], depth: usize, out: &mut [V::Scalar]) {
    if panel::<V>() == V::COUNT {
        tile_of::<V, 1>(left, right, depth, out);
    } else {
        tile_of::<V, VECTORS>(left, right, depth, out);
    }
}

#[inline(always)]
fn tile_of<V: Vector, const COUNT: usize>(
    left: &[V::Scalar],
    right: &[V::Scalar],
    depth: usize,
    out: &mut [V::Scalar],
) {
    let mut sums = [[V::splat(V::Scalar::ZERO); COUNT]; STRIP];
    let mut k = 0;
    while k < depth {
        let mut row = [V::splat(V::Scalar::ZERO); COUNT];
        let mut j = 0;
        while j < COUNT {
            row[j] = V::load(right, (k * COUNT + j) * V::COUNT);
            j += 1;
        }
        let Some(factors) = left[k * STRIP..].first_chunk::<STRIP>() else { panic!("fewer than {STRIP} factors left") };
        let mut i = 0;
        while i < STRIP {
            let factor = V::splat(factors[i]);
            let mut j = 0;
            while j < COUNT {
                sums[i][j] = factor.mul_add(row[j], sums[i][j]);
                j += 1;
            }
            i += 1;
        }
        k += 1;
    }
    let mut i = 0;
    while i < STRIP {
        let mut j = 0;
        while j < COUNT {
            sums[i][j].store(out, (i * COUNT + j) * V::COUNT);
            j += 1;
        }
        i += 1;
    }
}
