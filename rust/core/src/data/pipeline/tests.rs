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
    let shared = Arc::new(Shared {
        plan: plan(103, 50),
        schedule: schedule(103, 13),
        state: Mutex::default(),
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
