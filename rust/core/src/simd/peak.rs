//! How fast this machine multiplies and adds: what the benchmarks compare kernels with.

use std::hint::black_box;
use std::time::Instant;

use super::{Kernel, Lanes, Level, run};

/// Independent sums: enough for two multiply-adds a cycle of latency 4, few enough for 16 registers.
const CHAINS: usize = 12;
const STEPS: usize = 20_000;
/// The fastest of many short runs: a run that was interrupted says nothing.
const RUNS: usize = 100;

struct Chains;

impl Kernel for Chains {
    /// Flops per second.
    type Output = f64;

    #[inline(always)]
    fn run<V: Lanes>(self) -> f64 {
        let factor = V::splat(black_box(0.999_999));
        let term = V::splat(black_box(1e-6));
        let mut fastest = f64::INFINITY;
        let mut run = 0;
        while run < RUNS {
            let mut sums = [V::splat(black_box(1.0)); CHAINS];
            let start = Instant::now();
            let mut step = 0;
            while step < STEPS {
                let mut chain = 0;
                while chain < CHAINS {
                    sums[chain] = sums[chain].mul_add(factor, term);
                    chain += 1;
                }
                step += 1;
            }
            black_box(&sums);
            fastest = fastest.min(start.elapsed().as_secs_f64());
            run += 1;
        }
        (2 * V::COUNT * CHAINS * STEPS) as f64 / fastest
    }
}

/// Float32 multiply-adds of one thread at `level`, in flops per second (two for each multiply-add).
pub fn multiply_add_peak(level: Level) -> f64 {
    run(level, Chains)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wider_vectors_are_not_slower() {
        let portable = multiply_add_peak(Level::Portable);
        assert!(portable.is_finite() && portable > 1e8, "{portable}");
        assert!(multiply_add_peak(super::super::detected()) > portable / 2.0);
    }
}
