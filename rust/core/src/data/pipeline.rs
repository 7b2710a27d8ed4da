//! Threads that fill batches ahead of their consumer and hand them over in order.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::batch::{Plan, Slot};
use super::schedule::Schedule;
use crate::{Error, Result};

/// A batch up to this size is filled by the waiting consumer itself when no worker has begun it: quicker than
/// waking a thread, and short enough to answer Ctrl-C.
const HELP_BYTES: usize = 8 << 20;

/// A worker looks out for work so long before it falls asleep: being woken costs as much as filling a small batch.
const LOOKOUT: Duration = Duration::from_micros(30);

enum Status {
    Queued,
    Running,
    Done(Result<()>),
}

struct Job {
    step: usize,
    slot: Slot,
    status: Status,
}

#[derive(Default)]
struct State {
    /// Jobs in the order of their steps; the front is the next to be delivered, or has been and may be asked for again.
    jobs: VecDeque<Job>,
    next_step: usize,
    /// Workers asleep, and how many of them have been woken but are not up yet.
    idle: usize,
    woken: usize,
    waiting: bool,
    stop: bool,
}

struct Shared {
    plan: Plan,
    schedule: Schedule,
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
    /// Jobs that nobody has begun, to be seen without the lock.
    queued: AtomicUsize,
}

/// A batch on its way, or why there is none.
#[derive(Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The step's batch: rows, and the examples of the global batch.
    Batch(usize, usize),
    /// Nothing was submitted.
    Nothing,
    /// Not ready in time.
    Late,
}

/// Fills submitted slots, step after step. Dropping it stops and joins its threads, except in a forked child,
/// where they do not exist and their locks may be held for ever: there it is leaked.
pub struct Pipeline {
    shared: Option<Arc<Shared>>,
    workers: Vec<JoinHandle<()>>,
    process: u32,
}

impl Pipeline {
    /// Starts `threads` workers, at least one.
    ///
    /// # Safety
    /// The plan's source and labels stay in memory until the pipeline is closed or dropped.
    pub unsafe fn start(plan: Plan, schedule: Schedule, threads: usize) -> Result<Self> {
        let (plan, schedule) = (plan.checked()?, schedule.checked()?);
        if schedule.len != plan.len() {
            return Err(Error::Argument(format!("{}: schedule of {} examples", plan.name, schedule.len)));
        }
        let shared = Arc::new(Shared {
            plan,
            schedule,
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            queued: AtomicUsize::new(0),
        });
        let mut pipeline = Self { shared: Some(shared.clone()), workers: Vec::new(), process: std::process::id() };
        for number in 0..threads.max(1) {
            let shared = shared.clone();
            let worker = thread::Builder::new()
                .name(format!("ferrovae-{number}"))
                .spawn(move || shared.work())
                .map_err(|error| Error::Data(format!("a loader thread cannot be started: {error}")))?;
            pipeline.workers.push(worker);
        }
        Ok(pipeline)
    }

    /// Queues the next step into `slot`; false when the epoch has no step left. The next `take` sees to who fills it:
    /// a worker woken for a batch that the consumer then fills itself costs more than the batch.
    ///
    /// # Safety
    /// The slot's memory is live and touched by nobody else until its batch is delivered or the pipeline closed.
    pub unsafe fn submit(&self, slot: Slot) -> bool {
        let Some(shared) = &self.shared else { return false };
        let mut state = shared.lock();
        if state.stop || state.next_step == shared.schedule.steps() {
            return false;
        }
        let step = state.next_step;
        state.next_step += 1;
        state.jobs.push_back(Job { step, slot, status: Status::Queued });
        shared.queued.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Steps submitted so far.
    pub fn submitted(&self) -> usize {
        self.shared.as_ref().map_or(0, |shared| shared.lock().next_step)
    }

    /// The batch of `step`; waits for it at most `patience`, and meanwhile fills small ones itself. Gives up all
    /// before it; the same step may be taken again, by a consumer that was interrupted and does not know.
    pub fn take(&self, step: usize, patience: Duration) -> Result<Delivery> {
        let Some(shared) = &self.shared else { return Ok(Delivery::Nothing) };
        let deadline = Instant::now() + patience;
        let mut state = shared.lock();
        while state.jobs.front().is_some_and(|job| job.step < step && matches!(job.status, Status::Done(_))) {
            state.jobs.pop_front();
        }
        loop {
            let Some(job) = state.jobs.front() else { return Ok(Delivery::Nothing) };
            if job.step != step {
                return Err(Error::Argument(format!("step {step} asked for while {} is next", job.step)));
            }
            if let Status::Done(result) = &job.status {
                let rows = shared.schedule.part(step).rows;
                let delivery = result.clone().map(|()| Delivery::Batch(rows, shared.schedule.examples(step)));
                shared.wake(&mut state, 0);
                return delivery;
            }
            // Also a later one: the first may be under way, and would be waited for in idleness.
            if let Some(place) = state.jobs.iter().position(|job| shared.helps_with(job)) {
                shared.wake(&mut state, 1);
                state = shared.run(state, place);
                continue;
            }
            shared.wake(&mut state, 0);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Delivery::Late);
            }
            state.waiting = true;
            state = shared.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.waiting = false;
        }
    }

    /// Stops, and waits for the threads; afterwards nothing touches any slot. May be called again.
    pub fn close(&mut self) {
        if std::process::id() != self.process {
            std::mem::forget((self.shared.take(), std::mem::take(&mut self.workers)));
            return;
        }
        if let Some(shared) = self.shared.take() {
            shared.lock().stop = true;
            shared.work.notify_all();
            for worker in self.workers.drain(..) {
                // A worker catches its panics, so there is nothing to learn from how it ended.
                let _ = worker.join();
            }
        }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// Every update of the state is complete before its lock is released, so a poisoned one is still sound.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        while !state.stop {
            if let Some(place) = state.jobs.iter().position(|job| matches!(job.status, Status::Queued)) {
                state = self.run(state, place);
                continue;
            }
            drop(state);
            let until = Instant::now() + LOOKOUT;
            while self.queued.load(Ordering::Relaxed) == 0 && Instant::now() < until {
                thread::yield_now();
            }
            state = self.lock();
            if self.queued.load(Ordering::Relaxed) == 0 {
                state.idle += 1;
                while state.woken == 0 && !state.stop {
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.woken = state.woken.saturating_sub(1);
                state.idle -= 1;
            }
        }
    }

    /// Wakes a worker for each queued job, but for those that the consumer is about to fill.
    fn wake(&self, state: &mut State, own: usize) {
        let queued = self.queued.load(Ordering::Relaxed);
        while state.woken < state.idle.min(queued.saturating_sub(own)) {
            state.woken += 1;
            self.work.notify_one();
        }
    }

    /// Whether the consumer would fill this batch itself.
    fn helps_with(&self, job: &Job) -> bool {
        matches!(job.status, Status::Queued) && self.schedule.part(job.step).rows * self.plan.width * 4 <= HELP_BYTES
    }

    /// Runs the queued job at `place`, without the lock.
    fn run<'a>(&'a self, mut state: MutexGuard<'a, State>, place: usize) -> MutexGuard<'a, State> {
        let job = &mut state.jobs[place];
        job.status = Status::Running;
        self.queued.fetch_sub(1, Ordering::Relaxed);
        let (step, slot) = (job.step, job.slot);
        drop(state);
        let result = self.fill(step, &slot);
        let mut state = self.lock();
        // Jobs before this one may have been delivered meanwhile.
        if let Some(job) = state.jobs.iter_mut().find(|job| job.step == step) {
            job.status = Status::Done(result);
        }
        if state.waiting {
            self.done.notify_one();
        }
        state
    }

    fn fill(&self, step: usize, slot: &Slot) -> Result<()> {
        let part = self.schedule.part(step);
        // SAFETY: what `submit` was promised; a slot belongs to one job.
        catch_unwind(AssertUnwindSafe(|| unsafe { self.plan.fill(part, slot) })).unwrap_or_else(|panic| {
            let reason = panic.downcast_ref::<String>().map(String::as_str);
            let reason = reason.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(Error::Data(format!("{}: batch {step} of this pass could not be filled: {reason}", self.plan.name)))
        })
    }
}

#[cfg(test)]
mod tests;
