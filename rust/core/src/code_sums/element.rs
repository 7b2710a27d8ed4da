//! The element types of rows and results: read as `f64` without branches, so that the compiler vectorises the loops
//! over them.

use half::{bf16, f16};

/// An element of a row.
pub trait Element: Copy + Send + Sync {
    /// The same number.
    fn double(self) -> f64;
}

/// An element of the results.
pub trait Total: Copy + Send {
    /// The nearest to it.
    fn rounded(total: f64) -> Self;
}

impl Total for f32 {
    #[inline(always)]
    fn rounded(total: f64) -> Self {
        total as Self
    }
}

impl Total for f64 {
    #[inline(always)]
    fn rounded(total: f64) -> Self {
        total
    }
}

impl Element for f32 {
    #[inline(always)]
    fn double(self) -> f64 {
        f64::from(self)
    }
}

impl Element for f64 {
    #[inline(always)]
    fn double(self) -> f64 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn double(self) -> f64 {
        f64::from(f32::from_bits(u32::from(self.to_bits()) << 16))
    }
}

impl Element for f16 {
    #[inline(always)]
    fn double(self) -> f64 {
        let bits = u32::from(self.to_bits());
        let (sign, rest) = ((bits & 0x8000) << 16, (bits & 0x7FFF) << 13);
        // The exponent's bias is 15 here and 127 there; the product with 2^112 also makes denormals normal.
        let finite = (f32::from_bits(rest) * f32::from_bits((127 + 112) << 23)).to_bits();
        f64::from(f32::from_bits(sign | if rest < 0x7C00 << 13 { finite } else { rest | 0x7F80_0000 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::float_cmp)]
    fn every_half_is_read_exactly() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(half.double() == half.to_f64() || half.is_nan() && half.double().is_nan(), "{bits:x}");
            assert!(brain.double() == brain.to_f64() || brain.is_nan() && brain.double().is_nan(), "{bits:x}");
        }
    }
}
