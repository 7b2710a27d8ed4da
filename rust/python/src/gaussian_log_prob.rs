//! Binding of `gaussian_log_prob`.

use ferrovae_core::gaussian_log_prob::Gaussian;

crate::reduction::bind_density!(gaussian_log_prob, gaussian_log_prob_backward, Gaussian);
