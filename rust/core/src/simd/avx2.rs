//! AVX2: 8 lanes.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use super::lanes::{chunk, chunk_mut};
use super::{Kernel, Lanes};

/// 8 lanes.
#[derive(Clone, Copy)]
pub struct Avx2(__m256);

/// Runs the kernel compiled for AVX2 and FMA.
///
/// # Safety
/// The processor must have them.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// The bits, as integers.
#[inline(always)]
fn bits(lanes: __m256) -> __m256i {
    // SAFETY: lanes exist only inside `run`.
    unsafe { _mm256_castps_si256(lanes) }
}

/// The lanes with these bits.
#[inline(always)]
fn from_bits(bits: __m256i) -> Avx2 {
    // SAFETY: as above.
    Avx2(unsafe { _mm256_castsi256_ps(bits) })
}

/// Only the sign bits set.
#[inline(always)]
fn signs() -> __m256i {
    // SAFETY: as above.
    unsafe { _mm256_set1_epi32(i32::MIN) }
}

// SAFETY of every block below: lanes exist only inside `run`, where the instructions are known to be there.
impl Lanes for Avx2 {
    const COUNT: usize = 8;
    const FUSED: bool = true;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    fn load(values: &[f32], at: usize) -> Self {
        // SAFETY: inside `run`; the array has `COUNT` values, and unaligned loads are allowed.
        Self(unsafe { _mm256_loadu_ps(chunk::<8>(values, at).as_ptr()) })
    }

    #[inline(always)]
    fn store(self, values: &mut [f32], at: usize) {
        // SAFETY: inside `run`; the array has `COUNT` values, and unaligned stores are allowed.
        unsafe { _mm256_storeu_ps(chunk_mut::<8>(values, at).as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm256_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, term.0) })
    }

    #[inline(always)]
    fn mul_add_exact(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }

    #[inline(always)]
    fn at_least(self, floor: Self) -> Self {
        // The instruction returns its second operand when one is NaN.
        // SAFETY: inside `run`.
        Self(unsafe { _mm256_max_ps(floor.0, self.0) })
    }

    #[inline(always)]
    fn at_most(self, ceiling: Self) -> Self {
        // SAFETY: inside `run`; the second operand is returned when one is NaN.
        Self(unsafe { _mm256_min_ps(ceiling.0, self.0) })
    }

    #[inline(always)]
    fn negative_abs(self) -> Self {
        // SAFETY: inside `run`.
        from_bits(unsafe { _mm256_or_si256(bits(self.0), signs()) })
    }

    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        // SAFETY: inside `run`.
        from_bits(unsafe {
            _mm256_or_si256(_mm256_andnot_si256(signs(), bits(self.0)), _mm256_and_si256(signs(), bits(sign.0)))
        })
    }

    #[inline(always)]
    fn step(self) -> Self {
        // SAFETY: inside `run`.
        from_bits(unsafe { _mm256_andnot_si256(_mm256_srai_epi32::<31>(bits(self.0)), bits(Self::splat(1.0).0)) })
    }

    #[inline(always)]
    fn where_nonzero(self, condition: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_NEQ_UQ>(condition.0, _mm256_setzero_ps())) })
    }

    #[inline(always)]
    fn or_where_zero(self, condition: Self, other: Self) -> Self {
        // SAFETY: inside `run`.
        unsafe {
            let keep = _mm256_cmp_ps::<_CMP_NEQ_UQ>(condition.0, _mm256_setzero_ps());
            Self(_mm256_blendv_ps(other.0, self.0, keep))
        }
    }

    #[inline(always)]
    fn low_bits_to_exponent(self) -> Self {
        // SAFETY: inside `run`.
        from_bits(unsafe { _mm256_slli_epi32::<23>(bits(self.0)) })
    }
}
