//! A million steps: memory stays flat, counts stay exact, and the bits are those of a probe that begins there.

#![allow(unsafe_code, reason = "an allocator that counts")]

use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, Plan, Probe, Report, Rules, Tensor, TensorMut, Verdict,
    clip::{AdaptiveClip, LossScale},
    gsnr::GsnrConfig,
    write::{Background, Entry, JsonLines, Sink, charts::Course, live::View},
};
use half::bf16;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
        mpsc::{Receiver, channel},
    },
    thread,
    time::Instant,
};

/// Counts the bytes that are allocated and not freed, of all threads.
struct Counted;

static LIVE: AtomicI64 = AtomicI64::new(0);
static PEAK: AtomicI64 = AtomicI64::new(0);

// SAFETY: the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let size = i64::try_from(layout.size()).unwrap_or(i64::MAX);
        let live = LIVE.fetch_add(size, Ordering::Relaxed) + size;
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        LIVE.fetch_sub(i64::try_from(layout.size()).unwrap_or(i64::MAX), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static COUNTED: Counted = Counted;

/// Runs one test at a time, for the bytes of all threads are counted; on one thread, as tensors of a few elements are not worth
/// waking another.
fn alone(run: impl FnOnce() + Send) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(run);
}

/// What queues of threads may hold more at one time than at another.
const SLACK: i64 = 4096;
/// An entry that writers still have in hand besides, and a line of it. One byte a step would be three times that.
const ENTRY: i64 = 32_768;

/// Holds the memory at the end of a run against that at its tenth part.
#[derive(Default)]
struct Memory {
    live: i64,
    peak: i64,
}

impl Memory {
    fn note(&mut self) {
        *self = Self { live: LIVE.load(Ordering::Relaxed), peak: PEAK.load(Ordering::Relaxed) };
    }

    #[track_caller]
    fn is_as_noted(&self, slack: i64) {
        let (live, peak) = (LIVE.load(Ordering::Relaxed), PEAK.load(Ordering::Relaxed));
        println!("live bytes {} then, {live} now; peak {} then, {peak} now", self.live, self.peak);
        assert!((live - self.live).abs() <= slack, "{} live bytes have become {live}", self.live);
        assert!(peak - self.peak <= slack, "a peak of {} bytes has become {peak}", self.peak);
    }
}

fn plan() -> Plan {
    Plan::new([("a", DType::F32, 5), ("b", DType::BF16, 7), ("c", DType::F32, 3)]).unwrap()
}

/// The gradients of a step, under a loss scale of which they know nothing.
struct Gradients {
    a: [f32; 5],
    b: [bf16; 7],
    /// Comes and goes.
    c: Option<[f32; 3]>,
}

/// What is in them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Counts {
    nan: u64,
    inf: u64,
    zero: u64,
}

impl Gradients {
    /// Bursts of NaN, of Inf and of both, larger ones now and then.
    fn of(step: u64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "below 64")]
        let value = |t: u64, i: usize| ((step * 31 + t * 7 + i as u64 * 17) % 64) as f32 / 64.0 - 0.5;
        let size = if step.is_multiple_of(97) { 8.0 } else { 1.0 };
        let mut a = std::array::from_fn(|i| size * value(0, i));
        let mut b = std::array::from_fn(|i| bf16::from_f32(value(1, i)));
        let burst = step % 5000;
        if burst < 7 {
            a[1] = f32::NAN;
        }
        if (5..11).contains(&burst) {
            b[2] = bf16::NEG_INFINITY;
        }
        Self { a, b, c: (step % 5 != 2).then(|| std::array::from_fn(|i| value(2, i))) }
    }

    fn counts(&self) -> Counts {
        let all = self.a.into_iter().chain(self.b.map(f32::from)).chain(self.c.into_iter().flatten());
        all.fold(Counts::default(), |counts, x| Counts {
            nan: counts.nan + u64::from(x.is_nan()),
            inf: counts.inf + u64::from(x.is_infinite()),
            zero: counts.zero + u64::from(x == 0.0),
        })
    }

    fn tensors(&self) -> [&dyn Tensor; 3] {
        [&self.a, &self.b, self.c.as_ref().map_or(&Absent as &dyn Tensor, |c| c)]
    }

    fn tensors_mut<'a>(&'a mut self, absent: &'a mut Absent) -> [&'a mut dyn TensorMut; 3] {
        let c: &mut dyn TensorMut = match &mut self.c {
            Some(c) => c,
            None => absent,
        };
        [&mut self.a, &mut self.b, c]
    }
}

/// Measures and clips a step, and gives its report.
fn step(probe: &mut Probe, gradients: &mut Gradients) -> Report {
    probe.step(&mut gradients.tensors_mut(&mut Absent)).unwrap();
    probe.poll().unwrap().expect("the CPU is never behind")
}

fn zeros(report: &Report) -> u64 {
    report.records().iter().map(|record| record.zero_count).sum()
}

/// A probe that begins after this step.
fn begun_after(step: u64, config: &Config) -> Probe {
    let mut probe = Probe::new(Cpu, plan(), config.clone()).unwrap();
    let state = probe.state().unwrap();
    let mut after = state.clone();
    after.measured = step;
    probe.restore(&after).unwrap();
    probe
}

/// A probe that gets the state of this one has its bits from there on: of outputs, records and what is clipped.
fn is_one_that_begins_there(probe: &mut Probe, config: &Config) {
    let state = probe.state().unwrap();
    let mut fresh = Probe::new(Cpu, plan(), config.clone()).unwrap();
    fresh.restore(&state).unwrap();
    for number in state.measured + 1..=state.measured + 200 {
        let [mut of_old, mut of_new] = [(); 2].map(|()| Gradients::of(number));
        let (old, new) = (step(probe, &mut of_old), step(&mut fresh, &mut of_new));
        assert_eq!(bytemuck::bytes_of(old.outputs()), bytemuck::bytes_of(new.outputs()));
        assert_eq!(bytemuck::cast_slice::<_, u8>(old.records()), bytemuck::cast_slice::<_, u8>(new.records()));
        assert_eq!(bytemuck::bytes_of(&of_old.a), bytemuck::bytes_of(&of_new.a));
        assert_eq!(bytemuck::cast_slice::<_, u8>(&of_old.b), bytemuck::cast_slice::<_, u8>(&of_new.b));
    }
    assert_eq!(probe.state().unwrap(), fresh.state().unwrap());
}

/// Measurement, clip, loss scale, history, signal and noise, and a poll: every count of every step, over the 2^32nd.
#[test]
fn a_million_steps_are_counted_exactly_in_flat_memory() {
    alone(million_steps);
}

fn million_steps() {
    const STEPS: u64 = 1_000_000;
    const FIRST: u64 = u32::MAX as u64 - STEPS / 2;
    const KEPT: u64 = 48;
    const WINDOW: u32 = 700;
    let scale = LossScale::dynamic().initial(1024.0).growth_interval(450);
    let config = Config::new()
        .clip(Clip::global_norm(1.0))
        .loss_scale(scale)
        .history(48)
        .tracking(GsnrConfig::new().window(WINDOW));
    let mut probe = begun_after(FIRST, &config);
    let (mut memory, begun) = (Memory::default(), Instant::now());
    let (mut found, mut expected, mut skipped) = (Counts::default(), Counts::default(), [0u64; 2]);
    // What torch's GradScaler would have: 11 halvings and 11 doublings every 5000 steps.
    let (mut next_scale, mut tracker) = (scale.initial, 0);
    // Steps of each tensor's window, and those that it left out in it.
    let mut tracks = [(0u32, 0u32); 3];
    for number in FIRST + 1..=FIRST + STEPS {
        let mut gradients = Gradients::of(number);
        let (counts, is_absent) = (gradients.counts(), gradients.c.is_none());
        let of_tensors = [gradients.a[1].is_nan(), gradients.b[2].is_infinite(), false];
        let report = step(&mut probe, &mut gradients);
        let outputs = report.outputs();
        assert_eq!(outputs.step, number);
        let of_step = Counts { nan: outputs.nan_count, inf: outputs.inf_count, zero: zeros(&report) };
        assert_eq!(of_step, counts, "step {number}");
        let is_bad = counts.nan + counts.inf > 0;
        assert_eq!((outputs.skip, outputs.found_inf), (i32::from(is_bad), f32::from(u8::from(is_bad))));
        assert_eq!(outputs.loss_scale, next_scale, "step {number}");
        (next_scale, tracker) = match (is_bad, tracker + 1 == scale.growth_interval) {
            (true, _) => (next_scale * 0.5, 0),
            (false, true) => (next_scale * 2.0, 0),
            (false, false) => (next_scale, tracker + 1),
        };
        for (sum, of_step) in [(&mut found, of_step), (&mut expected, counts)] {
            *sum = Counts { nan: sum.nan + of_step.nan, inf: sum.inf + of_step.inf, zero: sum.zero + of_step.zero };
        }
        for (skipped, is_one) in skipped.iter_mut().zip([outputs.skip != 0, is_bad]) {
            *skipped += u64::from(is_one);
        }
        for (t, (steps, left_out)) in tracks.iter_mut().enumerate() {
            match (of_tensors[t], t == 2 && is_absent) {
                (_, true) => {}
                (true, _) => *left_out += 1,
                (false, _) if *steps == WINDOW => (*steps, *left_out) = (1, 0),
                (false, _) => *steps += 1,
            }
        }
        let done = number - FIRST;
        if done.is_multiple_of(50_000) {
            let history = probe.history().unwrap().report().unwrap();
            assert!(history.steps().map(|(step, _)| step.outputs.step).eq(number - KEPT + 1..=number));
            let gsnr = probe.gsnr().unwrap().report().unwrap();
            let found: Vec<_> = gsnr.tensors().map(|(_, record)| (record.steps, record.skipped)).collect();
            assert_eq!(found, tracks, "step {number}");
            assert!(next_scale.is_normal());
        }
        if done == STEPS / 10 {
            memory.note();
        }
    }
    let each = begun.elapsed().as_secs_f64() / STEPS as f64;
    memory.is_as_noted(SLACK);
    assert_eq!(found, expected);
    assert!(skipped[0] == skipped[1] && skipped[0] > 2_000);
    println!("{:.2} µs a step; {skipped:?} skipped, {found:?}", 1e6 * each);
    is_one_that_begins_there(&mut probe, &config);
}

/// A checkpoint may have been made under a longer interval.
#[test]
fn a_growth_tracker_of_any_value_lets_the_scale_grow() {
    let config = Config::new().loss_scale(LossScale::dynamic().growth_interval(450));
    for tracker in [449, 450, u32::MAX] {
        let mut probe = Probe::new(Cpu, plan(), config.clone()).unwrap();
        let mut state = probe.state().unwrap();
        state.loss_scale = Some((8.0, tracker));
        probe.restore(&state).unwrap();
        assert_eq!(step(&mut probe, &mut Gradients::of(100)).outputs().next_loss_scale, 16.0);
        assert_eq!(probe.state().unwrap().loss_scale, Some((16.0, 0)));
    }
}

/// Rules that learn: what they keep counts its steps beyond the 2^32nd, and decides as if it were the first.
#[test]
fn clips_that_learn_go_on_beyond_2_to_the_32_steps() {
    alone(learning_clips);
}

fn learning_clips() {
    const STEPS: u64 = 30_000;
    let max_norm = Some(2.0);
    for clip in [
        Clip::Percentile { percentile: 60.0, history: 1024, max_norm },
        Clip::zclip(),
        Clip::TensorEma { smoothing: 0.98, threshold: 1.05, warmup: 100, max_norm },
    ] {
        let config = Config::new().clip(clip).adaptive_clip(AdaptiveClip::new([5, 7, 3]));
        let [mut probe, mut far] = [(); 2].map(|()| Probe::new(Cpu, plan(), config.clone()).unwrap());
        let (mut memory, mut learnt, mut clipped, mut units) = (Memory::default(), 0, 0, 0);
        let weights: [&dyn Tensor; 3] = [&[0.1f32; 5], &[bf16::ONE; 7], &[0.0f32; 3]];
        // A multiple of the history, so that it goes on at the same place.
        const AHEAD: u64 = (1 << 32) - 2 * 4096;
        for number in 1..=STEPS {
            let [mut near, mut beyond] = [(); 2].map(|()| Gradients::of(number));
            let report = step(&mut probe, &mut near);
            if number == 4096 {
                let mut state = probe.state().unwrap();
                state.clip[0] += AHEAD;
                far.restore(&state).unwrap();
            }
            if number > 4096 {
                let other = step(&mut far, &mut beyond);
                assert_eq!(bytemuck::bytes_of(report.outputs()), bytemuck::bytes_of(other.outputs()), "{clip:?}");
                assert_eq!(bytemuck::bytes_of(&near.a), bytemuck::bytes_of(&beyond.a), "{clip:?}");
            }
            learnt += u64::from(report.outputs().found_inf == 0.0);
            clipped += u64::from(report.outputs().action != 0);
            let mut room = probe.adaptive_clip().unwrap();
            room.clip(&mut near.tensors_mut(&mut Absent), &weights).unwrap();
            units += u64::from(room.report().unwrap().clipped_fraction().is_some_and(|fraction| fraction > 0.0));
            if number == STEPS / 3 {
                memory.note();
            }
        }
        memory.is_as_noted(SLACK);
        assert_eq!([&mut probe, &mut far].map(|probe| probe.state().unwrap().clip[0]), [learnt, learnt + AHEAD]);
        assert!(learnt + AHEAD > 1 << 32 && clipped > 100 && units > 100, "{clip:?}: {clipped} {units}");
        is_one_that_begins_there(&mut probe, &config);
    }
}

/// Has no room for the second half of every thousand steps, and keeps what pictures and a view need.
struct Watcher {
    gate: Receiver<()>,
    is_open: bool,
    seen: Arc<AtomicU64>,
    course: Course,
    view: View,
}

fn has_room(step: u64) -> bool {
    step % 1000 < 500
}

impl Sink for Watcher {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        if !self.is_open {
            let _ = self.gate.recv();
            self.is_open = true;
        }
        self.course.push(entry)?;
        self.view.update(entry)?;
        self.seen.fetch_add(1, Ordering::Release);
        let full = || Error::Unwritable { path: "disk".into(), reason: "no room".to_owned() };
        has_room(entry.step()).then_some(()).ok_or_else(full)
    }
}

/// With rules, micro-batches and writers, whose disk is full at times: nothing grows, and no entry is counted twice or not at all.
#[test]
fn what_is_followed_and_written_takes_no_more_with_time() {
    alone(followed);
}

fn followed() {
    const STEPS: u64 = 100_000;
    const CAPACITY: u64 = 16;
    let config = Config::new()
        .clip(Clip::Quantile { quantile: 0.9 })
        .rules(Rules::default())
        .micro_batches(2)
        .tracking(GsnrConfig::new().window(1000));
    let mut probe = Probe::new(Cpu, plan(), config).unwrap();
    let ((open, gate), seen) = (channel(), Arc::new(AtomicU64::new(0)));
    let (course, view) = (Course::new(&plan()), View::new(&plan()));
    let sinks: Vec<Box<dyn Sink>> = vec![
        Box::new(JsonLines::open("/dev/null").unwrap()),
        Box::new(Watcher { gate, is_open: false, seen: Arc::clone(&seen), course, view }),
    ];
    let mut writers = Background::new(sinks, usize::try_from(CAPACITY).unwrap()).unwrap();
    let (mut memory, mut lost, mut critical, begun) = (Memory::default(), 0, 0, Instant::now());
    let mut first = None;
    for number in 1..=STEPS {
        let mut gradients = Gradients::of(number);
        for _ in 0..2 {
            probe.micro_batches().unwrap().measure(&gradients.tensors()).unwrap();
        }
        let report = step(&mut probe, &mut gradients);
        let micro_batches = probe.micro_batches().unwrap().report().unwrap();
        assert_eq!(micro_batches.len(), 2);
        let diagnosis = report.diagnosis().unwrap();
        let is_bad = report.outputs().found_inf != 0.0;
        assert!(!is_bad || diagnosis.verdict() == Verdict::Critical);
        critical += u64::from(is_bad);
        let entry = Entry::new(report.clone()).with_diagnosis(diagnosis).unwrap();
        let is_sent = writers.send(entry);
        if is_sent && !has_room(number) {
            lost += 1;
            first = first.or(Some(number));
        }
        // The queue is once as full as it gets, so that the peak is reached early.
        if number == 100 {
            open.send(()).unwrap();
        }
        // From then on it never is again.
        if number >= 100 && number.is_multiple_of(4) {
            while seen.load(Ordering::Acquire) < number - writers.dropped() {
                thread::yield_now();
            }
        }
        if number == STEPS / 10 {
            memory.note();
        }
    }
    println!(
        "{:.2} µs a step, {} dropped, {critical} critical",
        1e6 * begun.elapsed().as_secs_f64() / STEPS as f64,
        writers.dropped()
    );
    memory.is_as_noted(ENTRY);
    assert!((100 - CAPACITY - 1..=100 - CAPACITY).contains(&writers.dropped()), "{}", writers.dropped());
    let finished = writers.finish();
    assert_eq!(finished.lost, lost);
    assert_eq!(finished.written + finished.lost + finished.dropped, STEPS);
    let told = format!("step {} is lost: disk: no room", first.unwrap());
    assert_eq!(finished.error.unwrap().to_string(), told);
}
