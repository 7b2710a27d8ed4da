//! Binding of `poisson_log_prob`.

use ferrovae_core::poisson_log_prob::Poisson;

crate::reduction::bind_density!(poisson_log_prob, poisson_log_prob_backward, Poisson);
