//! The few vector operations the scan needs, for each instruction set. The scan is one generic body over them.

/// A register of `LANES` scores, or of what they are made from.
///
/// # Safety
/// Every method may use instructions beyond the baseline: call only inside a function that enables them, on a
/// processor that has them. Pointers must be valid for `LANES` elements; they need no alignment.
pub(super) trait Vector: Copy {
    type Element: Copy;
    const LANES: usize;
    unsafe fn splat(value: Self::Element) -> Self;
    unsafe fn load(from: *const Self::Element) -> Self;
    unsafe fn store(self, to: *mut Self::Element);
    /// `self + a * b`, fused or not: the error bound holds for both.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
}

/// A register of floats.
///
/// # Safety
/// As [`Vector`].
pub(super) trait Floats: Vector<Element = f32> {
    /// Lane by lane `if a < b { yes } else { no }`; only moves bits of `yes` and `no`.
    unsafe fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self;
    /// Bit l: lane l is `<=` that of `other`.
    unsafe fn at_most(self, other: Self) -> u32;
    /// Four columns of LANES rows at steps of `step`: lane l of column c is `from[l * step + c]`. The pointer must be
    /// valid for these.
    unsafe fn columns(from: *const f32, step: usize) -> [Self; 4];
}

/// Plain Rust, which the compiler vectorises with the target's baseline.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 4]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        // Written out: a loop of closures is not always inlined.
        let ([a, b, c, d], [e, g, h, i]) = (self.0, other.0);
        Self([f(a, e), f(b, g), f(c, h), f(d, i)])
    }
}

impl Vector for Portable {
    type Element = f32;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's contract on pointers.
        Self(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's contract on pointers.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        self.zip(a.zip(b, |a, b| a * b), |sum, product| sum + product)
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
}

impl Floats for Portable {
    #[inline(always)]
    unsafe fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
        let mut out = no.0;
        let mut lane = 0;
        while lane < 4 {
            out[lane] = if a.0[lane] < b.0[lane] { yes.0[lane] } else { no.0[lane] };
            lane += 1;
        }
        Self(out)
    }

    #[inline(always)]
    unsafe fn at_most(self, other: Self) -> u32 {
        let (mut bits, mut lane) = (0, 0);
        while lane < 4 {
            bits |= u32::from(self.0[lane] <= other.0[lane]) << lane;
            lane += 1;
        }
        bits
    }

    #[inline(always)]
    unsafe fn columns(from: *const f32, step: usize) -> [Self; 4] {
        let mut columns = [[0.0; 4]; 4];
        let mut row = 0;
        while row < 4 {
            // SAFETY: the trait's contract on pointers.
            let [a, b, c, d] = unsafe { from.add(row * step).cast::<[f32; 4]>().read_unaligned() };
            (columns[0][row], columns[1][row], columns[2][row], columns[3][row]) = (a, b, c, d);
            row += 1;
        }
        [Self(columns[0]), Self(columns[1]), Self(columns[2]), Self(columns[3])]
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Floats, Vector};
    use std::arch::x86_64::{
        __m256, __m512, _CMP_LE_OQ, _CMP_LT_OQ, _mm_loadu_ps, _mm256_blendv_ps, _mm256_castps128_ps256, _mm256_cmp_ps,
        _mm256_fmadd_ps, _mm256_insertf128_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps, _mm256_movemask_ps,
        _mm256_set1_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
        _mm512_castps128_ps512, _mm512_cmp_ps_mask, _mm512_fmadd_ps, _mm512_insertf32x4, _mm512_loadu_ps,
        _mm512_mask_blend_ps, _mm512_max_ps, _mm512_min_ps, _mm512_set1_ps, _mm512_shuffle_ps, _mm512_storeu_ps,
        _mm512_unpackhi_ps, _mm512_unpacklo_ps,
    };

    /// AVX2 and FMA: 16 registers, 8 of them the scores of 2 vectors of rows x 4 codes.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(__m256);

    /// AVX-512 F: 32 registers, 16 of them the scores of 2 vectors of rows x 8 codes, 6 what is kept of the rows.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(pub(in super::super) __m512);

    // SAFETY (all of both implementations): the trait's contract on instruction sets and pointers.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for Avx2 {
        type Element = f32;
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Self(unsafe { _mm256_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm256_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn plus_product(self, a: Self, b: Self) -> Self {
            Self(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            Self(unsafe { _mm256_min_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            Self(unsafe { _mm256_max_ps(self.0, other.0) })
        }
    }

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Floats for Avx2 {
        #[inline(always)]
        unsafe fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
            Self(unsafe { _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)) })
        }

        #[inline(always)]
        unsafe fn at_most(self, other: Self) -> u32 {
            unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(self.0, other.0)) as u32 }
        }

        #[inline(always)]
        unsafe fn columns(from: *const f32, step: usize) -> [Self; 4] {
            // Rows 0 and 4 in one register, 1 and 5 in the next; then 4 x 4 in both halves.
            unsafe {
                let row = |row: usize| _mm_loadu_ps(from.add(row * step));
                let pair = |first: usize| _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(row(first)), row(first + 4));
                let rows = [pair(0), pair(1), pair(2), pair(3)];
                let low = [_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpacklo_ps(rows[2], rows[3])];
                let high = [_mm256_unpackhi_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[2], rows[3])];
                [
                    Self(_mm256_shuffle_ps::<0b01_00_01_00>(low[0], low[1])),
                    Self(_mm256_shuffle_ps::<0b11_10_11_10>(low[0], low[1])),
                    Self(_mm256_shuffle_ps::<0b01_00_01_00>(high[0], high[1])),
                    Self(_mm256_shuffle_ps::<0b11_10_11_10>(high[0], high[1])),
                ]
            }
        }
    }

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for Avx512 {
        type Element = f32;
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Self(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn plus_product(self, a: Self, b: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            Self(unsafe { _mm512_min_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }
    }

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Floats for Avx512 {
        #[inline(always)]
        unsafe fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
            Self(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a.0, b.0), no.0, yes.0) })
        }

        #[inline(always)]
        unsafe fn at_most(self, other: Self) -> u32 {
            unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn columns(from: *const f32, step: usize) -> [Self; 4] {
            // Rows 0, 4, 8 and 12 in one register, 1, 5, 9 and 13 in the next; then 4 x 4 in each quarter.
            unsafe {
                let row = |row: usize| _mm_loadu_ps(from.add(row * step));
                let four = |first: usize| {
                    let rows = _mm512_castps128_ps512(row(first));
                    let rows = _mm512_insertf32x4::<1>(rows, row(first + 4));
                    let rows = _mm512_insertf32x4::<2>(rows, row(first + 8));
                    _mm512_insertf32x4::<3>(rows, row(first + 12))
                };
                let rows = [four(0), four(1), four(2), four(3)];
                let low = [_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpacklo_ps(rows[2], rows[3])];
                let high = [_mm512_unpackhi_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[2], rows[3])];
                [
                    Self(_mm512_shuffle_ps::<0b01_00_01_00>(low[0], low[1])),
                    Self(_mm512_shuffle_ps::<0b11_10_11_10>(low[0], low[1])),
                    Self(_mm512_shuffle_ps::<0b01_00_01_00>(high[0], high[1])),
                    Self(_mm512_shuffle_ps::<0b11_10_11_10>(high[0], high[1])),
                ]
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};
