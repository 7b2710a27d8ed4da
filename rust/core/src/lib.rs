//! What ferrovae computes in Rust: fused operations on slices, data reading, statistics of log weights.
//!
//! Every function takes plain slices that the caller has checked, and returns an [`Error`] rather than panicking.

pub mod bernoulli_log_prob;
pub mod categorical_log_prob;
pub mod code_logsumexp;
pub mod code_scores;
pub mod code_sums;
pub mod continuous_bernoulli_log_prob;
pub mod data;
pub mod discretized_logistic_log_prob;
pub mod discretized_logistic_mixture_log_prob;
pub mod error;
pub mod evidence;
pub mod gaussian_log_prob;
mod logistic;
pub mod nearest_code;
pub mod negative_binomial_log_prob;
pub mod philox;
pub mod poisson_log_prob;
pub mod reduction;
pub mod reparameterize_kl;
pub mod residual_nearest_code;
pub mod sample_code;
pub mod sign_code_entropy;
pub mod sign_code_mean;
pub mod simd;
pub mod threads;
pub mod values;

pub use error::{Error, Result};
