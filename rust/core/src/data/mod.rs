//! Reading datasets and filling batches: everything here is a pure function of files, seed, epoch and position.

pub mod batch;
pub mod gzip;
pub mod idx;
pub mod keys;
pub mod npy;
pub mod order;
pub mod pipeline;
mod rows;
pub mod schedule;
pub mod transform;
