//! Samples a few elements of each step's gradients, and their correlation over the steps.

pub(crate) mod cpu;
mod room;

pub use room::Samples;

pub(crate) use room::SampleArguments;

use crate::{Error, Plan, probe::Numbering};
use bytemuck::{Pod, Zeroable};

/// Chooses the number of elements to keep of each step, and the number of steps. Takes 4 bytes an element and step
/// where the gradients are.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, samples::SampleConfig};
///
/// let plan = Plan::new([("weight", DType::F32, 4)])?;
/// let mut probe = Probe::new(Cpu, plan, Config::new().samples(SampleConfig::new(2, 10)))?;
/// for size in [1.0f32, 2.0, 3.0] {
///     probe.measure(&[&[size; 4]])?;
///     probe.samples()?.take(&[&[size; 4]])?;
/// }
/// let report = probe.samples()?.report()?;
/// assert!((report.mean_correlation().unwrap() - 1.0).abs() < 1e-6); // both elements go together
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleConfig {
    elements: u32,
    steps: u32,
}

impl SampleConfig {
    /// The most elements of a step.
    pub const MAX_ELEMENTS: u32 = 65_536;

    /// Keeps so many elements, 1 to [`MAX_ELEMENTS`](Self::MAX_ELEMENTS), of the last so many steps, at least 2. They
    /// are spread evenly over all the elements of a plan, or are all when it has no more. 1000 are plenty.
    pub fn new(elements: u32, steps: u32) -> Self {
        Self { elements, steps }
    }

    /// Steps that are kept.
    pub(crate) fn steps(self) -> u32 {
        self.steps
    }

    /// Gives the places of the elements.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub(crate) fn places(self, plan: &Plan) -> Result<Vec<SamplePlace>, Error> {
        let refuse = |option, expected, value: u32| Error::InvalidConfig { option, expected, value: value.to_string() };
        if !(1..=Self::MAX_ELEMENTS).contains(&self.elements) {
            return Err(refuse("elements", "from 1 to 65536", self.elements));
        }
        if self.steps < 2 {
            return Err(refuse("steps", "at least 2", self.steps));
        }
        let all = plan.elements();
        let count = u64::from(self.elements).min(all);
        let mut tensors = plan.tensors().iter().zip(0u32..);
        let (mut tensor, mut begin, mut end) = (0, 0u64, 0u64);
        let mut places = Vec::new();
        for k in 0..u128::from(count) {
            // In u128: 2^40 elements times 2^16.
            #[expect(clippy::cast_possible_truncation, reason = "below the number of elements")]
            let element = (k * u128::from(all) / u128::from(count)) as u64;
            while element >= end {
                let Some((spec, index)) = tensors.next() else { return Ok(places) };
                (tensor, begin, end) = (index, end, end + spec.len);
            }
            places.push(SamplePlace { index: element - begin, tensor, reserved: 0 });
        }
        Ok(places)
    }
}

/// One element (16 bytes, the same on the device).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SamplePlace {
    /// Its place in the tensor.
    pub index: u64,
    /// The tensor's place in the plan.
    pub tensor: u32,
    /// Unused; 0.
    pub reserved: u32,
}
// The other side is in kernels/sample.cu.
const _: () = assert!(size_of::<SamplePlace>() == 16);

/// Set in the number of a step that was not finite.
pub(crate) const NONFINITE: u64 = 1 << 63;

/// Holds the sampled elements over the last steps, oldest first.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleReport {
    places: Vec<SamplePlace>,
    steps: Vec<(u64, Vec<f32>)>,
    skipped: usize,
}

impl SampleReport {
    /// Makes the report from a ring: the numbers of its steps, 0 where there is none yet, and the values of each.
    pub(crate) fn new(places: Vec<SamplePlace>, numbers: &[u64], ring: &[f32], numbering: &Numbering) -> Self {
        let count = places.len();
        let mut steps: Vec<(u64, Vec<f32>)> = Vec::new();
        let mut skipped = 0;
        for (slot, &number) in numbers.iter().enumerate().filter(|&(_, &number)| number != 0) {
            if number & NONFINITE != 0 {
                skipped += 1;
            } else {
                steps.push((number, ring[slot * count..(slot + 1) * count].to_vec()));
            }
        }
        steps.sort_by_key(|&(number, _)| number);
        steps.iter_mut().for_each(|(number, _)| *number = numbering.of(*number));
        Self { places, steps, skipped }
    }

    /// The places of the elements, in the order of the values.
    pub fn places(&self) -> &[SamplePlace] {
        &self.places
    }

    /// The finite steps by their numbers, oldest first, each with one value an element: NaN where its tensor was absent.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = (u64, &[f32])> {
        self.steps.iter().map(|(number, values)| (*number, values.as_slice()))
    }

    /// Steps left out because a gradient was not finite.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Gives the mean correlation of two different elements over the steps, from −1/(n−1) to 1: near 0 where elements
    /// move on their own, near 1 where all follow one direction. It is Pearson's, over all pairs of the n elements that
    /// were never absent and are not constant; `None` with fewer than two steps or two such elements. Over k steps
    /// chance alone makes it 0 ± about 1/k.
    pub fn mean_correlation(&self) -> Option<f64> {
        let steps = self.steps.len();
        if steps < 2 {
            return None;
        }
        // With every element centred and of length 1, the correlations add up to the square of their sum.
        let mut sums = vec![0.0; steps];
        let mut elements = 0.0;
        for element in 0..self.places.len() {
            let value = |step: usize| f64::from(self.steps[step].1[element]);
            if (0..steps).any(|step| value(step).is_nan()) {
                continue;
            }
            let mean = (0..steps).map(value).sum::<f64>() / to_f64(steps);
            let length = (0..steps).map(|step| (value(step) - mean).powi(2)).sum::<f64>().sqrt();
            if length > 0.0 {
                elements += 1.0;
                sums.iter_mut().enumerate().for_each(|(step, sum)| *sum += (value(step) - mean) / length);
            }
        }
        let all: f64 = sums.iter().map(|sum| sum * sum).sum();
        (elements >= 2.0).then(|| (all - elements) / (elements * (elements - 1.0)))
    }
}

#[expect(clippy::cast_precision_loss, reason = "a few steps")]
fn to_f64(count: usize) -> f64 {
    count as f64
}
