//! What ferrovae computes in Rust: fused operations on slices, data reading, statistics of log weights.
//!
//! Every function takes plain slices that the caller has checked, and returns an [`Error`] rather than panicking.

pub mod bernoulli_log_prob;
pub mod categorical_log_prob;
pub mod continuous_bernoulli_log_prob;
pub mod data;
pub mod error;
pub mod evidence;
pub mod gaussian_log_prob;
pub mod nearest_code;
pub mod negative_binomial_log_prob;
pub mod philox;
pub mod poisson_log_prob;
pub mod reduction;
pub mod reparameterize_kl;
pub mod simd;
pub mod threads;
pub mod values;

pub use error::{Error, Result};
