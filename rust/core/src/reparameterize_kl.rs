//! `reparameterize_kl`.
