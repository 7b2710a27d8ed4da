//! Reading datasets and filling batches.
