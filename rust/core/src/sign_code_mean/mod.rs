//! `sign_code_mean`: the mean distribution over the 2^d sign codes of N rows of independent bits, and its gradient.
//!
//! With p = sigmoid(slope x), a row's distribution is the product of a table over its first d / 2 bits and one over the
//! others, so that the mean is a matrix product of tables, N 2^(d/2) numbers each: never N 2^d.

mod backward;
mod forward;
mod product;
mod real;
mod tables;
#[cfg(test)]
mod tests;

pub use backward::{sign_code_mean_backward, sign_code_mean_backward_at};
pub use forward::{sign_code_mean, sign_code_mean_at};
pub use real::Real;

use crate::{Error, Result};

/// The most bits: a distribution over 2^18 codes.
pub const MOST_BITS: usize = 18;
/// Codes' probabilities, once computed, that are worth a thread.
const GRAIN: usize = 1 << 20;

/// How many bits the first table has, and how many the second.
fn halves(bits: usize) -> (usize, usize) {
    (bits / 2, bits - bits / 2)
}

/// Rows that are worth a thread.
fn grain(bits: usize) -> usize {
    (GRAIN >> bits).max(1)
}

fn check(numbers: usize, bits: usize, codes: usize) -> Result<()> {
    if (1..=MOST_BITS).contains(&bits) && codes == 1 << bits && numbers.is_multiple_of(bits) {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "sign_code_mean: {numbers} numbers in rows of {bits} bits and {codes} codes, expected 1 to {MOST_BITS} bits and 2^bits codes"
    )))
}
