//! AVX-512: 16 lanes.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use super::lanes::{chunk, chunk_mut};
use super::{Kernel, Lanes};

/// 16 lanes.
#[derive(Clone, Copy)]
pub struct Avx512(__m512);

/// Runs the kernel compiled for AVX-512 F, BW, DQ and VL.
///
/// # Safety
/// The processor must have them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

/// The bits, as integers.
#[inline(always)]
fn bits(lanes: __m512) -> __m512i {
    // SAFETY: lanes exist only inside `run`.
    unsafe { _mm512_castps_si512(lanes) }
}

/// The lanes with these bits.
#[inline(always)]
fn from_bits(bits: __m512i) -> Avx512 {
    // SAFETY: as above.
    Avx512(unsafe { _mm512_castsi512_ps(bits) })
}

/// Only the sign bits set.
#[inline(always)]
fn signs() -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_set1_epi32(i32::MIN) }
}

// SAFETY of every block below: lanes exist only inside `run`, where the instructions are known to be there.
impl Lanes for Avx512 {
    const COUNT: usize = 16;
    const FUSED: bool = true;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load(values: &[f32], at: usize) -> Self {
        // SAFETY: inside `run`; the array has `COUNT` values, and unaligned loads are allowed.
        Self(unsafe { _mm512_loadu_ps(chunk::<16>(values, at).as_ptr()) })
    }

    #[inline(always)]
    fn store(self, values: &mut [f32], at: usize) {
        // SAFETY: inside `run`; the array has `COUNT` values, and unaligned stores are allowed.
        unsafe { _mm512_storeu_ps(chunk_mut::<16>(values, at).as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: inside `run`.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, term.0) })
    }

    #[inline(always)]
    fn mul_add_exact(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }

    #[inline(always)]
    fn at_least(self, floor: Self) -> Self {
        // The instruction returns its second operand when one is NaN.
        // SAFETY: inside `run`.
        Self(unsafe { _mm512_max_ps(floor.0, self.0) })
    }

    #[inline(always)]
    fn at_most(self, ceiling: Self) -> Self {
        // SAFETY: inside `run`; the second operand is returned when one is NaN.
        Self(unsafe { _mm512_min_ps(ceiling.0, self.0) })
    }

    #[inline(always)]
    fn negative_abs(self) -> Self {
        // SAFETY: inside `run`.
        from_bits(unsafe { _mm512_or_si512(bits(self.0), signs()) })
    }

    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        // SAFETY: inside `run`.
        from_bits(unsafe {
            _mm512_or_si512(_mm512_andnot_si512(signs(), bits(self.0)), _mm512_and_si512(signs(), bits(sign.0)))
        })
    }

    #[inline(always)]
    fn step(self) -> Self {
        // SAFETY: inside `run`.
        from_bits(unsafe { _mm512_andnot_si512(_mm512_srai_epi32::<31>(bits(self.0)), bits(Self::splat(1.0).0)) })
    }

    #[inline(always)]
    fn where_nonzero(self, condition: Self) -> Self {
        // SAFETY: inside `run`.
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(condition.0, _mm512_setzero_ps());
            Self(_mm512_maskz_mov_ps(keep, self.0))
        }
    }

    #[inline(always)]
    fn or_where_zero(self, condition: Self, other: Self) -> Self {
        // SAFETY: inside `run`.
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(condition.0, _mm512_setzero_ps());
            Self(_mm512_mask_blend_ps(keep, other.0, self.0))
        }
    }

    #[inline(always)]
    fn low_bits_to_exponent(self) -> Self {
        // SAFETY: inside `run`.
        from_bits(unsafe { _mm512_slli_epi32::<23>(bits(self.0)) })
    }
}
