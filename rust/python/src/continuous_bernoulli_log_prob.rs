//! Binding of `continuous_bernoulli_log_prob`.

use ferrovae_core::continuous_bernoulli_log_prob::ContinuousBernoulli;

crate::reduction::bind_density!(
    continuous_bernoulli_log_prob,
    continuous_bernoulli_log_prob_backward,
    ContinuousBernoulli
);
