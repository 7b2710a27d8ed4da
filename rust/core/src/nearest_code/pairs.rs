//! Vectors of pairs of 16-bit integers, multiplied and added in 32 bits: two dimensions a lane.

use super::vector::{Floats, Vector};

/// A register of 32-bit integers; as a factor each is a pair of 16-bit ones, and `plus_product` adds both products.
///
/// # Safety
/// As [`Vector`].
pub(super) trait Pairs: Vector<Element = i32> {
    /// As many lanes of floats.
    type Floats: Floats;
    /// `low * scale` and `high * scale` rounded to integers, as pairs, and `squares` plus the squares of what rounding
    /// took. Of a value beyond 16 bits only some bits stay.
    unsafe fn round(
        low: Self::Floats,
        high: Self::Floats,
        scale: Self::Floats,
        squares: Self::Floats,
    ) -> (Self, Self::Floats);
    /// Which of 8 codes [steps, 8] score at most `limit`, for one row of a tile: `row` points to its first pair.
    unsafe fn near(row: *const i32, width: usize, codes: *const i32, bias: *const i32, steps: usize, limit: i32)
    -> u32;
    /// The bits set in `low` are those of `bits`, which has no others.
    unsafe fn with_low_bits(self, low: Self, bits: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::vector::Avx512;
    use super::{Pairs, Vector};
    use std::arch::x86_64::{
        __m512, __m512i, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm256_add_epi32, _mm256_cmple_epi32_mask,
        _mm256_dpwssd_epi32, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_setzero_si256, _mm512_andnot_si512,
        _mm512_cvtps_epi32, _mm512_dpwssd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mask_blend_epi16,
        _mm512_max_epi32, _mm512_min_epi32, _mm512_mul_ps, _mm512_or_si512, _mm512_roundscale_ps, _mm512_set1_epi32,
        _mm512_slli_epi32, _mm512_storeu_si512, _mm512_sub_ps,
    };

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    /// AVX-512 with VNNI: 32 registers, 16 of them the scores of 2 vectors of rows x 8 codes, 6 what is kept.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Vnni(__m512i);

    // SAFETY (all of both implementations): the trait's contract on instruction sets and pointers.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for Vnni {
        type Element = i32;
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn splat(value: i32) -> Self {
            Self(unsafe { _mm512_set1_epi32(value) })
        }

        #[inline(always)]
        unsafe fn load(from: *const i32) -> Self {
            Self(unsafe { _mm512_loadu_si512(from.cast()) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut i32) {
            unsafe { _mm512_storeu_si512(to.cast(), self.0) }
        }

        #[inline(always)]
        unsafe fn plus_product(self, a: Self, b: Self) -> Self {
            Self(unsafe { _mm512_dpwssd_epi32(self.0, a.0, b.0) })
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            Self(unsafe { _mm512_min_epi32(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            Self(unsafe { _mm512_max_epi32(self.0, other.0) })
        }
    }

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Pairs for Vnni {
        type Floats = Avx512;

        #[inline(always)]
        unsafe fn round(low: Avx512, high: Avx512, scale: Avx512, squares: Avx512) -> (Self, Avx512) {
            unsafe {
                let (low, squares) = rounded(_mm512_mul_ps(low.0, scale.0), squares.0);
                let (high, squares) = rounded(_mm512_mul_ps(high.0, scale.0), squares);
                let high = _mm512_slli_epi32::<16>(high);
                (Self(_mm512_mask_blend_epi16(0xAAAA_AAAA, low, high)), Avx512(squares))
            }
        }

        #[inline(always)]
        unsafe fn near(
            row: *const i32,
            width: usize,
            codes: *const i32,
            bias: *const i32,
            steps: usize,
            limit: i32,
        ) -> u32 {
            unsafe {
                let load = |from: *const i32| _mm256_loadu_si256(from.cast());
                // Two sums: half as long a chain of dependent additions.
                let mut sums = [load(bias), _mm256_setzero_si256()];
                let mut step = 0;
                while step + 1 < steps {
                    let (left, right) = (_mm256_set1_epi32(*row.add(step * width)), row.add((step + 1) * width));
                    sums[0] = _mm256_dpwssd_epi32(sums[0], left, load(codes.add(step * 8)));
                    sums[1] = _mm256_dpwssd_epi32(sums[1], _mm256_set1_epi32(*right), load(codes.add(step * 8 + 8)));
                    step += 2;
                }
                if step < steps {
                    let value = _mm256_set1_epi32(*row.add(step * width));
                    sums[0] = _mm256_dpwssd_epi32(sums[0], value, load(codes.add(step * 8)));
                }
                let scores = _mm256_add_epi32(sums[0], sums[1]);
                u32::from(_mm256_cmple_epi32_mask(scores, _mm256_set1_epi32(limit)))
            }
        }

        #[inline(always)]
        unsafe fn with_low_bits(self, low: Self, bits: Self) -> Self {
            Self(unsafe { _mm512_or_si512(_mm512_andnot_si512(low.0, self.0), bits.0) })
        }
    }

    /// The nearest integers, and the sum of squares with what rounding took.
    #[allow(clippy::undocumented_unsafe_blocks)]
    #[inline(always)]
    unsafe fn rounded(values: __m512, squares: __m512) -> (__m512i, __m512) {
        unsafe {
            let nearest = _mm512_roundscale_ps::<NEAREST>(values);
            let lost = _mm512_sub_ps(values, nearest);
            (_mm512_cvtps_epi32(nearest), _mm512_fmadd_ps(lost, lost, squares))
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Vnni;
