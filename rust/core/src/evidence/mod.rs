//! Statistics of log importance weights.
