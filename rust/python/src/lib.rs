//! `ferrovae._core`: converts arguments, releases the GIL, calls `ferrovae-core`, maps errors. Nothing is computed here.

// Every module's `register` has one signature, whether it can fail or not.
#![allow(clippy::unnecessary_wraps)]

mod bernoulli_log_prob;
mod categorical_log_prob;
mod code_logsumexp;
mod code_sums;
mod continuous_bernoulli_log_prob;
mod data;
mod discretized_logistic_log_prob;
mod discretized_logistic_mixture_log_prob;
mod errors;
mod evidence;
mod gaussian_log_prob;
mod memory;
mod nearest_code;
mod negative_binomial_log_prob;
mod poisson_log_prob;
mod reduction;
mod reparameterize_kl;
mod residual_nearest_code;
mod sample_code;
mod sign_code_entropy;
mod sign_code_mean;
mod typed;

use pyo3::prelude::*;

/// The level of SIMD kernels in use: `"avx512"`, `"avx512f"`, `"avx2"` or `"portable"`.
#[pyfunction]
fn simd_level() -> &'static str {
    ferrovae_core::simd::level().name()
}

/// Float32 multiply-adds of one thread with these kernels, in flops per second: measured anew at every call.
#[pyfunction]
fn multiply_add_peak(py: Python<'_>) -> f64 {
    py.detach(|| ferrovae_core::simd::multiply_add_peak(ferrovae_core::simd::level()))
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("DataError", module.py().get_type::<errors::DataError>())?;
    module.add_function(wrap_pyfunction!(multiply_add_peak, module)?)?;
    module.add_function(wrap_pyfunction!(simd_level, module)?)?;
    bernoulli_log_prob::register(module)?;
    categorical_log_prob::register(module)?;
    code_logsumexp::register(module)?;
    code_sums::register(module)?;
    continuous_bernoulli_log_prob::register(module)?;
    discretized_logistic_log_prob::register(module)?;
    discretized_logistic_mixture_log_prob::register(module)?;
    evidence::register(module)?;
    gaussian_log_prob::register(module)?;
    nearest_code::register(module)?;
    negative_binomial_log_prob::register(module)?;
    poisson_log_prob::register(module)?;
    reparameterize_kl::register(module)?;
    residual_nearest_code::register(module)?;
    sample_code::register(module)?;
    sign_code_entropy::register(module)?;
    sign_code_mean::register(module)?;
    data::register(module)
}
