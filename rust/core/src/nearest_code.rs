//! `nearest_code`.
