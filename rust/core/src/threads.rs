//! Sharing work between threads: scoped threads, started for one call, so nothing outlives a call or a `fork`.

use std::ops::Range;
use std::thread;

/// Cuts `0..items` into at most `threads` contiguous ranges of nearly equal size, none below `grain` items
/// (except when there is only one). No items, no ranges.
pub fn pieces(items: usize, grain: usize, threads: usize) -> Vec<Range<usize>> {
    if items == 0 {
        return Vec::new();
    }
    let count = (items / grain.max(1)).clamp(1, threads.max(1));
    let (size, extra) = (items / count, items % count);
    let mut start = 0;
    (0..count)
        .map(|piece| {
            let end = start + size + usize::from(piece < extra);
            let range = start..end;
            start = end;
            range
        })
        .collect()
}

/// Runs every task, the first on the calling thread and each other on a thread of its own; returns their results
/// in order. Tasks own the disjoint slices they write.
pub fn run<T: Send, F: FnOnce() -> T + Send>(tasks: Vec<F>) -> Vec<T> {
    let mut tasks = tasks.into_iter();
    let Some(first) = tasks.next() else { return Vec::new() };
    thread::scope(|scope| {
        let others: Vec<_> = tasks.map(|task| scope.spawn(task)).collect();
        let mut results = vec![first()];
        for other in others {
            match other.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once_and_respect_the_grain() {
        for items in [0, 1, 7, 64, 1000] {
            for grain in [1, 10, 2000] {
                for threads in [1, 2, 3, 16] {
                    let ranges = pieces(items, grain, threads);
                    let flat: Vec<usize> = ranges.iter().cloned().flatten().collect();
                    assert_eq!(flat, (0..items).collect::<Vec<_>>());
                    assert!(ranges.len() <= threads.max(1));
                    assert!(ranges.len() <= 1 || ranges.iter().all(|range| range.len() >= grain));
                }
            }
        }
    }

    #[test]
    fn results_come_back_in_order() {
        assert_eq!(run((0..5).map(|i| move || i * i).collect()), vec![0, 1, 4, 9, 16]);
    }
}
