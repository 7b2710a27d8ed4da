//! Threads kept between calls: to wake one takes far less time than to start one.
//!
//! After a `fork` a child has none of its parent's threads, and a lock that one of them held stays shut. So a pool
//! belongs to a process: a child that asks for one finds another's number in it, leaves it untouched and makes its own.

use std::collections::VecDeque;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{process, thread};

static POOL: AtomicPtr<Pool> = AtomicPtr::new(ptr::null_mut());

/// Calls `work` once for each number below `count`, on this thread and on up to `count - 1` others; returns when all
/// calls have. `work` must not unwind.
pub fn each(count: usize, work: &(dyn Fn(usize) + Sync)) {
    // SAFETY: only the lifetime changes. `work` is called for numbers below `count` alone, and this function returns
    // when as many calls have ended: a job that is still in the queue then only finds that nothing is left.
    let work = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work) };
    let job = Arc::new(Job { work, count, next: AtomicUsize::new(0), left: Mutex::new(count), done: Condvar::new() });
    if count > 1 {
        pool().invite(&job, count - 1);
    }
    job.help();
    let mut left = open(&job.left);
    while *left > 0 {
        left = job.done.wait(left).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Numbers that whoever has time takes, one after the other. The caller takes them too, so that it needs nobody: calls
/// within calls, and a system that gives no thread, cannot hang.
struct Job {
    work: &'static (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    left: Mutex<usize>,
    done: Condvar,
}

impl Job {
    fn help(&self) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.count {
                return;
            }
            (self.work)(number);
            let mut left = open(&self.left);
            *left -= 1;
            if *left == 0 {
                self.done.notify_one();
            }
        }
    }
}

struct Pool {
    process: u32,
    queue: Mutex<Queue>,
    ready: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<Job>>,
    threads: usize,
}

impl Pool {
    /// Asks `helpers` threads to help with a job, and starts those that are not there yet.
    fn invite(&'static self, job: &Arc<Job>, helpers: usize) {
        let mut queue = open(&self.queue);
        while queue.threads < helpers {
            if thread::Builder::new().name("ferrovae".to_owned()).spawn(|| self.serve()).is_err() {
                break;
            }
            queue.threads += 1;
        }
        queue.jobs.extend((0..helpers).map(|_| Arc::clone(job)));
        drop(queue);
        for _ in 0..helpers {
            self.ready.notify_one();
        }
    }

    fn serve(&self) {
        let mut queue = open(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job.help();
                queue = open(&self.queue);
            } else {
                queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// This process's pool. One is never freed: its threads sleep until the process ends.
fn pool() -> &'static Pool {
    let process = process::id();
    let mut found = POOL.load(Ordering::Acquire);
    loop {
        // SAFETY: null, or a pool that was leaked below.
        if let Some(pool) = unsafe { found.as_ref() }
            && pool.process == process
        {
            return pool;
        }
        let own = Box::into_raw(Box::new(Pool { process, queue: Mutex::default(), ready: Condvar::new() }));
        match POOL.compare_exchange(found, own, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just leaked.
            Ok(_) => return unsafe { &*own },
            Err(other) => {
                // SAFETY: nobody else has seen it.
                drop(unsafe { Box::from_raw(own) });
                found = other;
            }
        }
    }
}

fn open<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
