//! Which positions of the epoch a rank reads at each step.

use crate::{Error, Result};

/// Global batches of `batch` examples from position `start`; rank r of `world` gets the r-th contiguous part of each.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// Examples in the epoch.
    pub len: usize,
    /// The position of the first step.
    pub start: usize,
    /// Examples in a global batch; a multiple of `world`.
    pub batch: usize,
    /// Whether an incomplete last batch is left out.
    pub drop_last: bool,
    /// This rank.
    pub rank: usize,
    /// Ranks.
    pub world: usize,
}

/// One step of one rank: `rows` rows, of which the first `valid` are positions `start..`; the rest repeat `filler`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The position of the first row.
    pub start: usize,
    /// Rows that hold an example of their own.
    pub valid: usize,
    /// Rows in all: the same on every rank.
    pub rows: usize,
    /// The position shown again in rows that are not valid.
    pub filler: usize,
}

impl Schedule {
    /// Checks what the arithmetic relies on.
    pub fn checked(self) -> Result<Self> {
        if self.batch == 0 || self.world == 0 || self.rank >= self.world || !self.batch.is_multiple_of(self.world) {
            return Err(Error::Argument(format!(
                "schedule: batch {} over rank {} of {} is not an equal share",
                self.batch, self.rank, self.world
            )));
        }
        if self.start > self.len {
            return Err(Error::Argument(format!("schedule: start {} is beyond {} examples", self.start, self.len)));
        }
        Ok(self)
    }

    /// Steps from `start` to the end of the epoch: the same on every rank.
    pub fn steps(&self) -> usize {
        let remaining = self.len - self.start;
        if self.drop_last { remaining / self.batch } else { remaining.div_ceil(self.batch) }
    }

    /// Examples of the global batch at `step`.
    pub fn examples(&self, step: usize) -> usize {
        self.batch.min(self.len - self.start - step * self.batch)
    }

    /// What this rank reads at `step`, which is below [`Self::steps`].
    pub fn part(&self, step: usize) -> Part {
        let filler = self.start + step * self.batch;
        let examples = self.examples(step);
        let rows = examples.div_ceil(self.world);
        let first = (self.rank * rows).min(examples);
        Part { start: filler + first, valid: rows.min(examples - first), rows, filler }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_together_read_every_global_batch_once_in_order() {
        for len in [1, 5, 12, 13, 100] {
            for world in [1, 2, 3, 4] {
                for batch in [world, 4 * world] {
                    for (start, drop_last) in [(0, false), (0, true), (1, false), (len, false)] {
                        let of = |rank| Schedule { len, start, batch, drop_last, rank, world }.checked().unwrap();
                        let mut read = Vec::new();
                        for step in 0..of(0).steps() {
                            let parts: Vec<Part> = (0..world).map(|rank| of(rank).part(step)).collect();
                            assert!(parts.iter().all(|part| part.rows == parts[0].rows && part.valid <= part.rows));
                            assert!(parts.iter().all(|part| part.filler < len));
                            read.extend(parts.iter().flat_map(|part| part.start..part.start + part.valid));
                        }
                        let end = if drop_last { len - (len - start) % batch } else { len };
                        assert_eq!(read, (start..end).collect::<Vec<_>>());
                    }
                }
            }
        }
    }

    #[test]
    fn unequal_shares_are_refused() {
        let schedule = Schedule { len: 10, start: 0, batch: 5, drop_last: false, rank: 0, world: 2 };
        assert!(schedule.clone().checked().is_err());
        assert!(Schedule { world: 1, rank: 1, ..schedule.clone() }.checked().is_err());
        assert!(Schedule { world: 1, start: 11, ..schedule }.checked().is_err());
    }
}
