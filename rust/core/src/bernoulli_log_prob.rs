//! `bernoulli_log_prob`.
