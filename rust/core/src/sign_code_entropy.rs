//! `sign_code_entropy`: the entropy of independent bits, in nats, and its gradient.
//!
//! With p = sigmoid(a), a = slope x: h = log(1 + exp(-|a|)) + |a| sigmoid(-|a|), and dh/da = -a p (1 - p). In `f64`: the
//! exponentials are few beside the work that the distribution over codes takes.

use crate::sign_code_mean::Real;
use crate::threads;
use crate::{Error, Result};

/// Numbers whose entropies are summed together, whatever the threads.
const CHUNK: usize = 4096;

/// The sum over all of x of the entropies of bits that are 1 with probability sigmoid(slope x).
pub fn sign_code_entropy<T: Real>(x: &[T], slope: f64, threads: usize) -> f64 {
    let tasks = threads::pieces(x.len().div_ceil(CHUNK), 1, threads).into_iter().map(|chunks| {
        let x = &x[chunks.start * CHUNK..x.len().min(chunks.end * CHUNK)];
        move || x.chunks(CHUNK).map(|chunk| chunk.iter().map(|x| entropy(slope * x.double())).sum()).collect()
    });
    let sums: Vec<Vec<f64>> = threads::run(tasks.collect());
    sums.into_iter().flatten().fold(0.0, |sum, next| sum + next)
}

/// Writes the gradient in x of `grad` times that sum.
pub fn sign_code_entropy_backward<T: Real>(
    x: &[T],
    grad: f64,
    slope: f64,
    out: &mut [T],
    threads: usize,
) -> Result<()> {
    if out.len() != x.len() {
        return Err(Error::Argument(format!("sign_code_entropy: room for {} of {} gradients", out.len(), x.len())));
    }
    let mut left = out;
    let tasks = threads::pieces(x.len(), CHUNK, threads).into_iter().map(|range| {
        let out = left.split_off_mut(..range.len()).unwrap_or_default();
        let x = &x[range];
        move || {
            for (out, x) in out.iter_mut().zip(x) {
                *out = T::round(grad * slope * derivative(slope * x.double()));
            }
        }
    });
    threads::run(tasks.collect());
    Ok(())
}

/// h(a); 0 for an infinite one.
fn entropy(a: f64) -> f64 {
    let factor = (-a.abs()).exp();
    if factor == 0.0 { 0.0 } else { factor.ln_1p() + a.abs() * (factor / (1.0 + factor)) }
}

/// dh/da; 0 for an infinite one.
fn derivative(a: f64) -> f64 {
    let factor = (-a.abs()).exp();
    if factor == 0.0 { 0.0 } else { -a * factor / (1.0 + factor).powi(2) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropies_are_those_of_the_two_probabilities() {
        for a in [0.0, 0.1, -0.7, 3.0, -12.0, 30.0] {
            let (p, q) = (1.0 / (1.0 + f64::exp(-a)), 1.0 / (1.0 + f64::exp(a)));
            let truth = -p * p.ln() - q * q.ln();
            assert!((entropy(a) - truth).abs() < 1e-14, "{a}: {} is not {truth}", entropy(a));
            let slope = p * q * (q.ln() - p.ln());
            assert!((derivative(a) - slope).abs() < 1e-14, "{a}: {} is not {slope}", derivative(a));
        }
    }

    #[test]
    fn infinite_numbers_are_certain_and_nan_is_kept() {
        for a in [f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!((entropy(a).to_bits(), derivative(a).to_bits()), (0, 0));
        }
        assert!(entropy(f64::NAN).is_nan() && derivative(f64::NAN).is_nan());
    }

    #[test]
    fn threads_change_no_bit() {
        let x: Vec<f32> = (0..50_000).map(|i| (i % 977) as f32 * 0.01 - 4.0).collect();
        let truth = sign_code_entropy(&x, 1.3, 1);
        for threads in [2, 3, 7] {
            assert_eq!(sign_code_entropy(&x, 1.3, threads).to_bits(), truth.to_bits());
        }
        let mut gradients = vec![vec![0.0; x.len()]; 2];
        for (out, threads) in gradients.iter_mut().zip([1, 5]) {
            sign_code_entropy_backward(&x, 2.0, 1.3, out, threads).unwrap();
        }
        assert_eq!(gradients[0], gradients[1]);
        assert!(sign_code_entropy_backward(&x, 2.0, 1.3, &mut [0.0; 3], 1).is_err());
        assert_eq!(sign_code_entropy::<f64>(&[], 1.0, 4).to_bits(), 0);
    }
}
