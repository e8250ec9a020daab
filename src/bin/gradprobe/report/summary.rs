//! A run as the page shows it, made in one pass over its steps. `page.js` describes the layout.

use super::{
    buckets::{Bucket, Buckets, Join},
    causes::{Cause, Causes},
};
use crate::{
    failure::Failure,
    run::{Histogram, Number, Run, Step, Tensor},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use gradprobe::Verdict;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// Buckets of a curve, each with its smallest and its largest number.
const POINTS: u64 = 1000;
/// The most columns of the heat map, for few tensors.
const COLUMNS: u64 = 800;
/// The most cells of a heat map, for many tensors: 1.8 MB of the page for each measure.
const CELLS: u64 = 320 * 1024;
/// Cells of all measures of all runs together: 5.6 MB of the page.
pub const ALL_CELLS: usize = 1 << 20;
/// Columns of all histograms together; one has some 20 octaves, 40 bytes. 2 MB of the page.
const HISTOGRAMS: u64 = 40 * 1024;

/// A number of each tensor in the heat map: its name on the page, and the way to read it.
type Measure = (&'static str, fn(&Tensor<'_>) -> Option<f64>);

/// Signal to noise has a list of its own in a line. Without that, AdamW's moments give it.
const GSNR: &str = "gsnr";
const MEASURES: [Measure; 7] = [
    ("l2_norm", |tensor| of(tensor.l2_norm)),
    ("ratio", |tensor| of(tensor.ratio)),
    ("update_ratio", |tensor| of(tensor.update_ratio)),
    ("dead_share", |tensor| (tensor.count > 0).then(|| tensor.dead_count as f64 / tensor.count as f64)),
    (GSNR, |tensor| of(tensor.moments_gsnr)),
    ("nan_count", |tensor| Some(tensor.nan_count as f64)),
    ("inf_count", |tensor| Some(tensor.inf_count as f64)),
];

fn of(number: Option<Number>) -> Option<f64> {
    number.map(|Number(number)| number)
}

/// A run, reduced.
#[derive(Serialize)]
pub struct Summary {
    /// The folder of the run, or its file.
    name: String,
    /// The worst of all steps.
    verdict: Option<&'static str>,
    last_verdict: Option<&'static str>,
    steps: u64,
    first: u64,
    last: u64,
    healthy: u64,
    warning: u64,
    critical: u64,
    /// Steps that the clip made smaller, steps to skip, and steps with a norm that is not finite.
    clipped: u64,
    skipped: u64,
    nonfinite: u64,
    curves: Vec<Curve>,
    verdicts: Verdicts,
    tensors: Vec<TensorSummary>,
    columns: Columns,
    measures: BTreeMap<&'static str, Base64>,
    histogram: Histograms,
    findings: Vec<Cause>,
}

/// A number of each step.
#[derive(Serialize)]
struct Curve {
    name: String,
    /// Whether it is the trainer's own.
    scalar: bool,
    steps: Base64,
    values: Base64,
    /// Steps in which it is NaN or infinite.
    nonfinite: u64,
    first_value: Exact,
    last_value: Exact,
}

#[derive(Serialize)]
struct Verdicts {
    first: Base64,
    last: Base64,
    /// 0 healthy, 1 warning, 2 critical.
    worst: Base64,
}

#[derive(Serialize)]
struct TensorSummary {
    name: String,
    /// The worst of its steps, and the first that is not healthy.
    verdict: Option<&'static str>,
    unhealthy_since: Option<u64>,
    /// The object of the last step with details, as the run has it.
    last: Box<RawValue>,
}

#[derive(Serialize)]
struct Columns {
    first: Base64,
    last: Base64,
}

#[derive(Serialize)]
struct Histograms {
    first: Base64,
    last: Base64,
    /// One a tensor: the start of its shares, the exponent of its lowest octave, and the number of octaves.
    tensors: Vec<(usize, i32, usize)>,
    shares: Base64,
}

/// A number with all its digits, as the run has it.
#[derive(Clone, Copy)]
pub struct Exact(pub f64);

impl Serialize for Exact {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        gradprobe::write::json_number(self.0).serialize(serializer)
    }
}

/// Numbers of one type, little-endian, in base64.
struct Base64(Vec<u8>);

impl Base64 {
    fn bytes<const N: usize>(bytes: impl IntoIterator<Item = [u8; N]>) -> Self {
        Self(bytes.into_iter().flatten().collect())
    }

    fn f64(values: impl IntoIterator<Item = f64>) -> Self {
        Self::bytes(values.into_iter().map(f64::to_le_bytes))
    }

    /// Step numbers: exact up to 2^53.
    fn steps(steps: impl IntoIterator<Item = u64>) -> Self {
        Self::f64(steps.into_iter().map(|step| step as f64))
    }
}

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

/// The least and the greatest finite number of some steps, and the first that is not finite, each with its step.
#[derive(Clone, Copy, Default)]
struct Range {
    low: Option<(u64, f64)>,
    high: Option<(u64, f64)>,
    nonfinite: Option<(u64, f64)>,
}

impl Range {
    fn new(step: u64, value: f64) -> Self {
        let point = Some((step, value));
        if value.is_finite() {
            Self { low: point, high: point, nonfinite: None }
        } else {
            Self { nonfinite: point, ..Self::default() }
        }
    }

    /// Gives up to three points, by their steps.
    fn points(&self) -> Vec<(u64, f64)> {
        let mut points: Vec<_> = [self.low, self.high, self.nonfinite].into_iter().flatten().collect();
        points.sort_by_key(|&(step, _)| step);
        points.dedup_by_key(|&mut (step, _)| step);
        points
    }
}

impl Join for Range {
    fn join(&mut self, later: Self) {
        self.low = [self.low, later.low].into_iter().flatten().min_by(|a, b| a.1.total_cmp(&b.1));
        // Of equal ones the first, as for the least.
        self.high = [later.high, self.high].into_iter().flatten().max_by(|a, b| a.1.total_cmp(&b.1));
        self.nonfinite = self.nonfinite.or(later.nonfinite);
    }
}

/// A curve that grows.
struct Growing {
    scalar: bool,
    ranges: Buckets<Range>,
    nonfinite: u64,
    first: f64,
    last: f64,
}

impl Growing {
    fn into_curve(self, name: String) -> Curve {
        let points: Vec<(u64, f64)> = self.ranges.filled().iter().flat_map(|bucket| bucket.of.points()).collect();
        Curve {
            name,
            scalar: self.scalar,
            steps: Base64::steps(points.iter().map(|point| point.0)),
            values: Base64::f64(points.iter().map(|point| point.1)),
            nonfinite: self.nonfinite,
            first_value: Exact(self.first),
            last_value: Exact(self.last),
        }
    }
}

impl Join for Verdict {
    fn join(&mut self, later: Self) {
        *self = later.max(*self);
    }
}

/// A cell without a number: a NaN with other bits than those of a number that is NaN.
const NONE: f32 = f32::from_bits(0x7fc0_0001);

/// The cells of a column, a list for each measure.
struct Cells([Vec<f32>; MEASURES.len()]);

impl Join for Cells {
    fn join(&mut self, later: Self) {
        for (earlier, later) in self.0.iter_mut().flatten().zip(later.0.iter().flatten()) {
            *earlier = largest(*earlier, *later);
        }
    }
}

/// Gives the larger of two cells. NaN is larger than all, so that none is lost.
fn largest(a: f32, b: f32) -> f32 {
    let is_none = |x: f32| x.to_bits() == NONE.to_bits();
    if is_none(a) || (b.is_nan() && !is_none(b)) {
        b
    } else if is_none(b) || a.is_nan() {
        a
    } else {
        a.max(b)
    }
}

/// A cell's number. A finite one stays finite.
#[expect(clippy::cast_possible_truncation, reason = "rounded to the nearest f32")]
fn narrow(number: Option<f64>) -> f32 {
    match number {
        None => NONE,
        Some(x) if x.is_nan() => f32::NAN,
        Some(x) if x.is_finite() => (x as f32).clamp(f32::MIN, f32::MAX),
        Some(x) => x as f32,
    }
}

/// Octaves of f32: the first is all that is below 2^-126.
const OCTAVES: usize = 255;
const LOWEST: i32 = -127;
/// Behind the octaves: elements that are 0, infinite, NaN.
const KINDS: usize = OCTAVES + 3;

/// Counts of a tensor's elements by octaves, of all steps of a column.
#[derive(Clone)]
struct Counts(Box<[u64; KINDS]>);

impl Counts {
    fn new(histogram: &Histogram<'_>) -> Self {
        let mut counts = Box::new([0; KINDS]);
        for &(Number(lowest), count) in &histogram.bins {
            counts[octave(lowest)] += count;
        }
        let beside = [histogram.zero_count, histogram.inf_count, histogram.nan_count];
        counts[OCTAVES..].copy_from_slice(&beside);
        Self(counts)
    }
}

/// The octave of a magnitude, from its exponent.
fn octave(magnitude: f64) -> usize {
    let exponent = magnitude.to_bits() >> 52 & 0x7ff;
    // 1023 is that of 1.
    let above = exponent.saturating_sub(1023 - LOWEST.unsigned_abs() as u64);
    usize::try_from(above).map_or(OCTAVES - 1, |above| above.min(OCTAVES - 1))
}

impl Join for Vec<Option<Counts>> {
    fn join(&mut self, later: Self) {
        for (earlier, later) in self.iter_mut().zip(later) {
            match (earlier.as_mut(), later) {
                (Some(earlier), Some(later)) => earlier.0.iter_mut().zip(*later.0).for_each(|(a, b)| *a += b),
                (None, later) => *earlier = later,
                (_, None) => {}
            }
        }
    }
}

/// A tensor while the run is read.
struct Seen {
    name: String,
    verdict: Option<Verdict>,
    unhealthy_since: Option<u64>,
}

/// A summary of the steps so far.
struct Reading {
    verdict: Option<Verdict>,
    last_verdict: Option<Verdict>,
    steps: u64,
    first: u64,
    last: u64,
    of_verdict: [u64; 3],
    clipped: u64,
    skipped: u64,
    nonfinite: u64,
    curves: Vec<(String, Growing)>,
    verdicts: Buckets<Verdict>,
    tensors: Vec<Seen>,
    places: HashMap<String, usize>,
    cells: Buckets<Cells>,
    histograms: Buckets<Vec<Option<Counts>>>,
    causes: Causes,
}

impl Summary {
    /// Reads a run to its end, and keeps at most so many cells of its heat map.
    pub fn read(path: &Path, cells: usize) -> Result<Self, Failure> {
        let mut run = Run::open(path)?;
        let mut reading = Reading::new();
        // The last line with details.
        let mut detailed = Vec::new();
        while let Some(step) = run.next()? {
            let details = step.tensors.is_some();
            let added = reading.add(&step);
            drop(step);
            added.map_err(|reason| run.damaged(reason))?;
            if details {
                run.swap_line(&mut detailed);
            }
        }
        if reading.steps == 0 {
            return Err(Failure::file(run.path(), "has no step that is whole"));
        }
        let name = path.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        Ok(reading.into_summary(name.unwrap_or_else(|| path.display().to_string()), &detailed, cells))
    }

    /// Gives the first tensor that another run lacks, where no tensor is in both. A run without details has any.
    pub fn differs_from(&self, other: &Self) -> Option<&str> {
        let has = |tensor: &TensorSummary| other.tensors.iter().any(|there| there.name == tensor.name);
        let differs = !other.tensors.is_empty() && !self.tensors.iter().any(has);
        self.tensors.first().filter(|_| differs).map(|tensor| tensor.name.as_str())
    }
}

impl Reading {
    fn new() -> Self {
        Self {
            verdict: None,
            last_verdict: None,
            steps: 0,
            first: 0,
            last: 0,
            of_verdict: [0; 3],
            clipped: 0,
            skipped: 0,
            nonfinite: 0,
            curves: Vec::new(),
            verdicts: Buckets::new(POINTS),
            tensors: Vec::new(),
            places: HashMap::new(),
            cells: Buckets::new(COLUMNS),
            histograms: Buckets::new(COLUMNS),
            causes: Causes::default(),
        }
    }

    /// Adds a step. An error gives the reason why it cannot be of this run.
    fn add(&mut self, step: &Step<'_>) -> Result<(), String> {
        if self.steps == 0 {
            self.first = step.step;
        }
        self.steps += 1;
        self.skipped += u64::from(step.skip);
        self.clipped += u64::from(of(step.clip_coefficient).is_some_and(|coefficient| coefficient < 1.0));
        self.nonfinite += u64::from(of(step.total_norm).is_some_and(|norm| !norm.is_finite()));
        for (name, &value) in &step.scalars {
            self.add_to_curve(name, true, step.step, value);
        }
        let own = [
            ("total_norm", step.total_norm),
            ("clip_coefficient", step.clip_coefficient),
            ("noise_scale", step.noise_scale),
        ];
        for (name, value) in own {
            self.add_to_curve(name, false, step.step, value);
        }
        if let Some(verdict) = step.verdict {
            self.verdict = self.verdict.max(Some(verdict));
            self.of_verdict[verdict as usize] += 1;
            self.verdicts.add(step.step, verdict);
        }
        self.last_verdict = step.verdict;
        self.causes.add(step.step, self.last, step.findings.as_deref().unwrap_or_default());
        self.last = step.step;
        match &step.tensors {
            Some(tensors) => self.add_details(step, tensors),
            None => Ok(()),
        }
    }

    fn add_to_curve(&mut self, name: &str, scalar: bool, step: u64, value: Option<Number>) {
        let Some(Number(value)) = value else { return };
        let place = self.curves.iter().position(|(known, curve)| known == name && curve.scalar == scalar);
        let place = place.unwrap_or_else(|| {
            let curve = Growing { scalar, ranges: Buckets::new(POINTS), nonfinite: 0, first: value, last: value };
            self.curves.push((name.to_owned(), curve));
            self.curves.len() - 1
        });
        let curve = &mut self.curves[place].1;
        curve.ranges.add(step, Range::new(step, value));
        curve.nonfinite += u64::from(!value.is_finite());
        curve.last = value;
    }

    fn add_details(&mut self, step: &Step<'_>, tensors: &[Tensor<'_>]) -> Result<(), String> {
        if self.tensors.is_empty() {
            let seen =
                |tensor: &Tensor<'_>| Seen { name: tensor.name.to_string(), verdict: None, unhealthy_since: None };
            self.tensors = tensors.iter().map(seen).collect();
            self.places = tensors.iter().enumerate().map(|(place, tensor)| (tensor.name.to_string(), place)).collect();
            let count = (tensors.len() as u64).max(1);
            self.cells = Buckets::new((CELLS / count).clamp(8, COLUMNS));
            self.histograms = Buckets::new((HISTOGRAMS / count).clamp(4, COLUMNS / 2));
        }
        if tensors.len() != self.tensors.len() {
            return Err(format!("{} tensors, where the lines before have {}", tensors.len(), self.tensors.len()));
        }
        for (seen, tensor) in self.tensors.iter_mut().zip(tensors) {
            if seen.name != tensor.name {
                return Err(format!("tensor {:?}, where the lines before have {:?}", tensor.name, seen.name));
            }
            seen.verdict = seen.verdict.max(tensor.verdict);
            if tensor.verdict > Some(Verdict::Healthy) {
                seen.unhealthy_since.get_or_insert(step.step);
            }
        }
        let mut cells = MEASURES.map(|(_, measure)| {
            tensors.iter().map(|tensor| narrow(if tensor.absent { None } else { measure(tensor) })).collect::<Vec<_>>()
        });
        for gsnr in step.gsnr.iter().filter(|gsnr| gsnr.mean.is_some()) {
            let plane = MEASURES.iter().position(|&(name, _)| name == GSNR).expect("is one");
            cells[plane][self.place(&gsnr.name)?] = narrow(of(gsnr.mean));
        }
        self.cells.add(step.step, Cells(cells));
        if !step.histogram.is_empty() {
            let mut counts = vec![None; self.tensors.len()];
            for histogram in &step.histogram {
                counts[self.place(&histogram.name)?] = Some(Counts::new(histogram));
            }
            self.histograms.add(step.step, counts);
        }
        Ok(())
    }

    fn place(&self, name: &str) -> Result<usize, String> {
        self.places.get(name).copied().ok_or_else(|| format!("{name:?} is no tensor of this run"))
    }

    fn into_summary(mut self, name: String, detailed: &[u8], cells: usize) -> Summary {
        #[derive(serde::Deserialize)]
        struct Details {
            tensors: Vec<Box<RawValue>>,
        }

        let last: Vec<Box<RawValue>> =
            serde_json::from_slice(detailed).map_or_else(|_| Vec::new(), |details: Details| details.tensors);
        let tensors = self.tensors.into_iter().zip(last).map(|(seen, last)| TensorSummary {
            name: seen.name,
            verdict: seen.verdict.map(Verdict::name),
            unhealthy_since: seen.unhealthy_since,
            last,
        });
        let measures = loop {
            let measures = measures(self.cells.filled());
            let kept = measures.len() * self.cells.filled().len() * self.places.len();
            if kept <= cells || self.cells.filled().len() == 1 {
                break measures;
            }
            self.cells.halve();
        };
        let [healthy, warning, critical] = self.of_verdict;
        let histogram = Histograms::new(&self.histograms, self.places.len());
        // Loss before all others; ours in their order, behind the trainer's.
        let mut curves = self.curves;
        curves.sort_by_key(|(name, curve)| (!curve.scalar, name != "loss"));
        Summary {
            name,
            verdict: self.verdict.map(Verdict::name),
            last_verdict: self.last_verdict.map(Verdict::name),
            steps: self.steps,
            first: self.first,
            last: self.last,
            healthy,
            warning,
            critical,
            clipped: self.clipped,
            skipped: self.skipped,
            nonfinite: self.nonfinite,
            curves: curves.into_iter().map(|(name, curve)| curve.into_curve(name)).collect(),
            verdicts: Verdicts {
                first: firsts(&self.verdicts),
                last: lasts(&self.verdicts),
                worst: Base64::bytes(self.verdicts.filled().iter().map(|bucket| [bucket.of as u8])),
            },
            tensors: tensors.collect(),
            columns: Columns { first: firsts(&self.cells), last: lasts(&self.cells) },
            measures,
            histogram,
            findings: self.causes.into_worst_first(),
        }
    }
}

fn firsts<T: Join>(buckets: &Buckets<T>) -> Base64 {
    Base64::steps(buckets.filled().iter().map(|bucket| bucket.first))
}

fn lasts<T: Join>(buckets: &Buckets<T>) -> Base64 {
    Base64::steps(buckets.filled().iter().map(|bucket| bucket.last))
}

/// Gives the measures that the run has, column after column. Leaves out counts that are 0 throughout.
fn measures(columns: &[Bucket<Cells>]) -> BTreeMap<&'static str, Base64> {
    let mut measures = BTreeMap::new();
    for (place, (name, _)) in MEASURES.into_iter().enumerate() {
        let cells = || columns.iter().flat_map(|column| column.of.0[place].iter());
        let tells = |&&cell: &&f32| cell.to_bits() != NONE.to_bits() && (cell != 0.0 || !name.ends_with("count"));
        if cells().any(|cell| tells(&cell)) {
            measures.insert(name, Base64::bytes(cells().map(|cell| cell.to_le_bytes())));
        }
    }
    measures
}

impl Histograms {
    fn new(columns: &Buckets<Vec<Option<Counts>>>, tensors: usize) -> Self {
        let (mut shares, mut places) = (Vec::new(), Vec::new());
        for tensor in 0..tensors {
            let counts: Vec<Option<&Counts>> =
                columns.filled().iter().map(|column| column.of[tensor].as_ref()).collect();
            let any = |octave: &usize| counts.iter().flatten().any(|counts| counts.0[*octave] > 0);
            let low = (0..OCTAVES).find(any).unwrap_or(0);
            let high = (low..OCTAVES).rfind(any).map_or(low, |high| high + 1);
            places.push((shares.len(), LOWEST + i32::try_from(low).unwrap_or(0), high - low));
            for counts in counts {
                let of = |kind: usize| counts.map_or(0, |counts| counts.0[kind]);
                let total = counts.map_or(0, |counts| counts.0.iter().sum());
                shares.extend((low..high).chain(OCTAVES..KINDS).map(|kind| share(of(kind), total)));
            }
        }
        let shares = Base64::bytes(shares.into_iter().map(u16::to_le_bytes));
        Self { first: firsts(columns), last: lasts(columns), tensors: places, shares }
    }
}

/// Gives a share in units of 1/65535. One that is not 0 does not become 0.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 65535")]
fn share(count: u64, total: u64) -> u16 {
    if count == 0 { 0 } else { (65535.0 * count as f64 / total as f64).round().max(1.0) as u16 }
}
