//! Statistics of log importance weights: how large their mean is, and whether that mean can be believed.

pub mod log_mean_exp;
pub mod pareto;
pub mod statistics;
pub mod tail;

pub use log_mean_exp::LogSums;
pub use statistics::{LogWeights, Summary};
