//! `philox`.
