//! Binding of `negative_binomial_log_prob`.

use ferrovae_core::negative_binomial_log_prob::NegativeBinomial;

crate::reduction::bind_density!(negative_binomial_log_prob, negative_binomial_log_prob_backward, NegativeBinomial);
