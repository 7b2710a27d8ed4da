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

/// A worker looks out for work so long before it falls asleep: being woken costs as much as filling a small batch
/// (2 to 18 % more images/s in batches of 128 x 784 on two cores).
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
        let state = State { jobs: VecDeque::new(), next_step: 0, idle: 0, woken: 0, waiting: false, stop: false };
        let shared = Arc::new(Shared {
            plan,
            schedule,
            state: Mutex::new(state),
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
mod tests {
    use super::super::batch::Source;
    use super::super::order::Order;
    use super::super::transform::{Draw, Transform};
    use super::*;
    use crate::simd;

    struct Buffers {
        x: Vec<f32>,
        index: Vec<i64>,
        label: Vec<i64>,
        valid: Vec<u8>,
    }

    impl Buffers {
        fn new(rows: usize, width: usize) -> Self {
            Self { x: vec![f32::NAN; rows * width], index: vec![-1; rows], label: vec![-1; rows], valid: vec![9; rows] }
        }

        fn slot(&mut self) -> Slot {
            Slot {
                x: self.x.as_mut_ptr() as usize,
                index: self.index.as_mut_ptr() as usize,
                label: self.label.as_mut_ptr() as usize,
                valid: self.valid.as_mut_ptr() as usize,
                capacity: self.index.len(),
            }
        }
    }

    fn plan(len: usize, width: usize) -> Plan {
        let data: Vec<u8> = (0..len * width).map(|i| (i % 251) as u8).collect();
        let labels: Vec<i64> = (0..len as i64).map(|i| 10 * i).collect();
        Plan {
            name: "test".into(),
            source: Source::U8(data.leak()),
            width,
            labels: Some(labels.leak()),
            order: Order::shuffled(len, 1, 2),
            transform: Some(Transform { draw: Draw::Dequantize, scale: 1.0, shift: 0.0 }),
            draw_key: 5,
            level: simd::level(),
        }
    }

    fn schedule(len: usize, batch: usize) -> Schedule {
        Schedule { len, start: 0, batch, drop_last: false, rank: 0, world: 1 }
    }

    /// Reads the whole epoch with `slots` slots in flight; rows by index.
    fn epoch(threads: usize, batch: usize, slots: usize) -> Vec<(i64, Vec<u32>)> {
        let (len, width) = (103, 50);
        // SAFETY: the plan's memory is leaked.
        let pipeline = unsafe { Pipeline::start(plan(len, width), schedule(len, batch), threads).unwrap() };
        let mut ring: VecDeque<Buffers> = (0..slots).map(|_| Buffers::new(batch, width)).collect();
        let mut flying = VecDeque::new();
        let mut rows = Vec::new();
        let mut step = 0;
        loop {
            while let Some(mut buffers) = ring.pop_front() {
                // SAFETY: the vectors' heap memory does not move with them.
                if !unsafe { pipeline.submit(buffers.slot()) } {
                    break;
                }
                flying.push_back(buffers);
            }
            match pipeline.take(step, Duration::from_secs(20)).unwrap() {
                Delivery::Batch(count, _) => {
                    step += 1;
                    let buffers = flying.pop_front().unwrap();
                    for row in 0..count {
                        assert_eq!(buffers.label[row], 10 * buffers.index[row]);
                        assert_eq!(buffers.valid[row], 1);
                        let x = &buffers.x[row * width..][..width];
                        rows.push((buffers.index[row], x.iter().map(|y| y.to_bits()).collect()));
                    }
                    ring.push_back(buffers);
                }
                Delivery::Nothing => return rows,
                Delivery::Late => panic!("late"),
            }
        }
    }

    #[test]
    fn the_stream_is_the_same_for_any_threads_batch_and_depth() {
        let expected = epoch(1, 10, 1);
        let mut indices: Vec<i64> = expected.iter().map(|row| row.0).collect();
        indices.sort_unstable();
        assert_eq!(indices, (0..103).collect::<Vec<_>>());
        for (threads, batch, slots) in [(1, 103, 2), (2, 7, 3), (4, 1, 8), (3, 64, 2)] {
            assert_eq!(epoch(threads, batch, slots), expected);
        }
    }

    #[test]
    fn a_panic_is_an_error_at_its_place_in_the_order() {
        let mut broken = plan(12, 3);
        broken.order = Order::Table((0..6).collect()); // position 6 panics
        // SAFETY: the plan's memory is leaked, and the buffers outlive the pipeline.
        unsafe {
            let mut buffers: Vec<Buffers> = (0..4).map(|_| Buffers::new(3, 3)).collect();
            let pipeline = Pipeline::start(broken, schedule(12, 3), 2).unwrap();
            let _ = std::panic::take_hook();
            std::panic::set_hook(Box::new(|_| {}));
            assert!(buffers.iter_mut().all(|buffers| pipeline.submit(buffers.slot())));
            for step in 0..2 {
                assert_eq!(pipeline.take(step, Duration::from_secs(20)), Ok(Delivery::Batch(3, 3)));
            }
            let error = pipeline.take(2, Duration::from_secs(20)).unwrap_err();
            assert_eq!(pipeline.take(2, Duration::from_secs(20)), Err(error.clone()));
            let _ = std::panic::take_hook();
            let error = error.to_string();
            assert!(error.contains("batch 2") && error.contains("out of bounds"), "{error}");
        }
    }

    #[test]
    fn closing_with_work_in_flight_joins_and_is_final() {
        let mut buffers: Vec<Buffers> = (0..8).map(|_| Buffers::new(13, 50)).collect();
        // SAFETY: the plan's memory is leaked, and the buffers outlive the pipeline.
        unsafe {
            let mut pipeline = Pipeline::start(plan(103, 50), schedule(103, 13), 3).unwrap();
            for buffers in &mut buffers {
                pipeline.submit(buffers.slot());
            }
            pipeline.close();
            pipeline.close();
            assert!(!pipeline.submit(buffers[0].slot()));
            assert_eq!(pipeline.take(0, Duration::ZERO), Ok(Delivery::Nothing));
        }
    }

    #[test]
    fn a_step_is_given_again_until_the_next_is_asked_for() {
        let mut buffers: Vec<Buffers> = (0..2).map(|_| Buffers::new(60, 50)).collect();
        // SAFETY: the plan's memory is leaked, and the buffers outlive the pipeline.
        unsafe {
            let pipeline = Pipeline::start(plan(103, 50), schedule(103, 60), 1).unwrap();
            assert_eq!(pipeline.take(0, Duration::ZERO), Ok(Delivery::Nothing));
            for (step, buffers) in buffers.iter_mut().enumerate() {
                assert_eq!(pipeline.submitted(), step);
                assert!(pipeline.submit(buffers.slot()));
            }
            for (step, rows) in [(0, 60), (0, 60), (1, 43), (1, 43)] {
                assert_eq!(pipeline.take(step, Duration::from_secs(20)), Ok(Delivery::Batch(rows, rows)));
            }
            assert!(pipeline.take(0, Duration::ZERO).is_err());
            assert_eq!(pipeline.take(2, Duration::ZERO), Ok(Delivery::Nothing));
        }
    }

    #[test]
    fn a_consumer_fills_a_later_batch_while_the_first_is_under_way() {
        let mut buffers: Vec<Buffers> = (0..2).map(|_| Buffers::new(13, 50)).collect();
        let state = State { jobs: VecDeque::new(), next_step: 0, idle: 0, woken: 0, waiting: false, stop: false };
        let shared = Arc::new(Shared {
            plan: plan(103, 50),
            schedule: schedule(103, 13),
            state: Mutex::new(state),
            work: Condvar::new(),
            done: Condvar::new(),
            queued: AtomicUsize::new(0),
        });
        let pipeline = Pipeline { shared: Some(shared.clone()), workers: Vec::new(), process: std::process::id() };
        for buffers in &mut buffers {
            // SAFETY: the plan's memory is leaked, and the buffers outlive the pipeline.
            assert!(unsafe { pipeline.submit(buffers.slot()) });
        }
        shared.lock().jobs[0].status = Status::Running;
        assert_eq!(pipeline.take(0, Duration::ZERO), Ok(Delivery::Late));
        assert!(matches!(shared.lock().jobs[1].status, Status::Done(Ok(()))));
        assert!(buffers[1].x.iter().all(|x| x.is_finite()));
        shared.lock().jobs[0].status = Status::Done(Ok(()));
        assert_eq!(pipeline.take(0, Duration::ZERO), Ok(Delivery::Batch(13, 13)));
        assert_eq!(pipeline.take(1, Duration::ZERO), Ok(Delivery::Batch(13, 13)));
        assert_eq!(pipeline.take(2, Duration::ZERO), Ok(Delivery::Nothing));
    }
}
