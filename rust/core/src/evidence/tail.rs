//! The largest values of a stream, in memory that depends on how many are wanted and not on the stream's length.

/// Keeps the `wanted` largest values pushed. Holds at most `2 * wanted` of them; a push costs O(1) amortised.
#[derive(Debug, Clone)]
pub struct Tail {
    wanted: usize,
    /// Nothing at or below this can be among the largest any more, except as a tie of it.
    floor: f64,
    values: Vec<f64>,
}

impl Tail {
    /// An empty tail.
    pub fn new(wanted: usize) -> Self {
        Self { wanted, floor: f64::NEG_INFINITY, values: Vec::new() }
    }

    /// Offers a value; -inf and NaN are never kept.
    #[inline]
    pub fn push(&mut self, value: f64) {
        if value > self.floor {
            self.values.push(value);
            if self.values.len() >= 2 * self.wanted.max(1) {
                self.shrink();
            }
        }
    }

    /// The `wanted` largest, ascending; -inf stands for those that never came.
    pub fn ascending(&self) -> Vec<f64> {
        let mut largest = self.clone();
        largest.shrink();
        largest.values.resize(self.wanted, f64::NEG_INFINITY);
        largest.values.sort_unstable_by(f64::total_cmp);
        largest.values
    }

    fn shrink(&mut self) {
        if self.values.len() > self.wanted && self.wanted > 0 {
            self.values.select_nth_unstable_by(self.wanted - 1, |a, b| b.total_cmp(a));
            self.floor = self.values[self.wanted - 1];
        }
        self.values.truncate(self.wanted);
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_sorting_the_whole_stream(values in prop::collection::vec(-5i32..50, 0..300), wanted in 0usize..40) {
            let mut tail = Tail::new(wanted);
            let mut all: Vec<f64> = values.iter().map(|&value| f64::from(value)).collect();
            for &value in &all {
                tail.push(value);
                prop_assert!(tail.values.len() <= 2 * wanted.max(1));
            }
            all.resize(all.len().max(wanted), f64::NEG_INFINITY);
            all.sort_unstable_by(f64::total_cmp);
            prop_assert_eq!(tail.ascending(), &all[all.len() - wanted..]);
        }
    }

    #[test]
    fn zero_weights_and_nan_are_not_kept() {
        let mut tail = Tail::new(2);
        for value in [f64::NEG_INFINITY, f64::NAN, 1.0] {
            tail.push(value);
        }
        assert_eq!(tail.ascending(), [f64::NEG_INFINITY, 1.0]);
    }
}
