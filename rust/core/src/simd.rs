//! Which instruction set the kernels use: probed once, capped by `FERROVAE_SIMD`.
//!
//! A [`Kernel`] is written once over [`Lanes`]; [`run`] compiles it for every level and calls the one asked for.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
mod lanes;
mod memory;
mod peak;
mod portable;
pub mod special;
mod two;

use std::sync::OnceLock;

pub use exp::{exp, exp_m1_negative_abs, exp_negative_abs};
pub use lanes::{Kernel, Lanes};
pub use memory::{Aligned, LINE, prefetch, stream, streamed};
pub use peak::multiply_add_peak;
pub use two::Two;

/// Instruction sets with a kernel of their own, slowest first. All give the same results, to rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Plain Rust: whatever the target's baseline vectorises to (SSE2, NEON).
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512F,
    /// The same with VNNI, which multiplies and adds 16-bit integers twice as fast as floats.
    Avx512,
}

const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512F, Level::Avx512];

impl Level {
    /// The name used by `FERROVAE_SIMD` and `ferrovae info`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512F => "avx512f",
            Self::Avx512 => "avx512",
        }
    }

    /// The level of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        ALL.into_iter().find(|level| level.name() == name)
    }
}

/// The best level this processor has.
pub fn detected() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx2 && avx512 {
            return if is_x86_feature_detected!("avx512vnni") { Level::Avx512 } else { Level::Avx512F };
        }
        if avx2 {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// The levels that can run here, slowest first: what tests compare with each other.
pub fn available() -> Vec<Level> {
    ALL.into_iter().filter(|&level| level <= detected()).collect()
}

/// The level in use: the best one, or the one `FERROVAE_SIMD` caps it at. Read once per process.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let cap = std::env::var("FERROVAE_SIMD").ok().and_then(|name| Level::from_name(&name));
        cap.map_or_else(detected, |cap| cap.min(detected()))
    })
}

/// Runs the kernel at `level`, or at the best one there is when the processor lacks that.
pub fn run<K: Kernel>(level: Level, kernel: K) -> K::Output {
    match level.min(detected()) {
        // SAFETY: `detected` saw AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::run(kernel) },
        // SAFETY: `detected` saw AVX-512 F, BW, DQ and VL.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512F | Level::Avx512 => unsafe { avx512::run(kernel) },
        _ => kernel.run::<portable::Portable>(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_order_is_slowest_first() {
        for level in ALL {
            assert_eq!(Level::from_name(level.name()), Some(level));
        }
        assert_eq!(Level::from_name("mmx"), None);
        assert!(available().is_sorted() && available().contains(&level()));
    }
}
