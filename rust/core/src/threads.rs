//! Sharing work between threads.

mod pool;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};
use std::{mem, thread};

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

/// Runs every task, on the calling thread and as many others as there are more tasks; returns their results in order.
/// Tasks own the disjoint slices they write. A panic of one goes on in the caller, when all have ended.
pub fn run<T: Send, F: FnOnce() -> T + Send>(tasks: Vec<F>) -> Vec<T> {
    let slots: Vec<_> = tasks.into_iter().map(|task| Mutex::new(Slot::Waiting(task))).collect();
    pool::each(slots.len(), &|number| {
        let mut slot = slots[number].lock().unwrap_or_else(PoisonError::into_inner);
        if let Slot::Waiting(task) = mem::replace(&mut *slot, Slot::Taken) {
            *slot = Slot::Done(catch_unwind(AssertUnwindSafe(task)));
        }
    });
    let results = slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner));
    results
        .filter_map(|slot| match slot {
            Slot::Done(Ok(result)) => Some(result),
            Slot::Done(Err(panic)) => resume_unwind(panic),
            Slot::Waiting(_) | Slot::Taken => None,
        })
        .collect()
}

enum Slot<T, F> {
    Waiting(F),
    Taken,
    Done(thread::Result<T>),
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

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

    #[test]
    fn calls_within_calls_and_from_many_threads_end() {
        let inner = |i: usize| run((0..2).map(|j| move || i + j).collect()).iter().sum::<usize>();
        let sum = |n: usize| run((0..n).map(|i| move || inner(i)).collect());
        thread::scope(|scope| {
            for n in 0..20 {
                scope.spawn(move || assert_eq!(sum(n), (0..n).map(|i| 2 * i + 1).collect::<Vec<_>>()));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_after_the_others_ended() {
        let ended = AtomicUsize::new(0);
        let tasks = (0..4).map(|i| {
            let ended = &ended;
            move || {
                assert!(i != 1, "task {i}");
                ended.fetch_add(1, Ordering::Relaxed);
            }
        });
        let panic = catch_unwind(AssertUnwindSafe(|| run(tasks.collect()))).unwrap_err();
        assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some("task 1"));
        assert_eq!(ended.into_inner(), 3);
        assert_eq!(run(vec![|| 7]), vec![7]);
    }
}
