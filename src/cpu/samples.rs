//! The ring of sampled elements.

use crate::{
    Error, HostTensor, Plan, SampleConfig, StepOutputs,
    backend::with_elements,
    dtype::sealed::Bits,
    samples::{NONFINITE, SamplePlace, SampleReport},
};

/// Elements of the last steps, each step at its number modulo their count.
#[derive(Clone, Debug)]
pub(super) struct Samples {
    places: Vec<SamplePlace>,
    numbers: Vec<u64>,
    ring: Vec<f32>,
}

impl Samples {
    pub(super) fn new(plan: &Plan, config: &SampleConfig) -> Result<Self, Error> {
        let places = config.places(plan)?;
        let steps = config.steps() as usize;
        let bytes = places.len().saturating_mul(steps).saturating_mul(size_of::<f32>());
        let mut ring = Vec::new();
        ring.try_reserve_exact(places.len().saturating_mul(steps)).map_err(|_| Error::OutOfMemory { bytes })?;
        ring.resize(places.len() * steps, 0.0);
        Ok(Self { places, numbers: vec![0; steps], ring })
    }

    /// Keeps the elements of the step that was measured last.
    #[expect(clippy::cast_possible_truncation, reason = "below the number of steps, and of elements")]
    pub(super) fn keep(&mut self, tensors: &[HostTensor<'_>], outputs: &StepOutputs) {
        let slot = ((outputs.step - 1) % self.numbers.len() as u64) as usize;
        self.numbers[slot] = if outputs.found_inf == 0.0 { outputs.step } else { outputs.step | NONFINITE };
        let values = self.ring[slot * self.places.len()..].iter_mut();
        for (value, place) in values.zip(&self.places) {
            let index = place.index as usize;
            let mut wide = [0.0];
            with_elements!(HostTensor, tensors[place.tensor as usize], elements => {
                Bits::widen_slice(&elements[index..=index], &mut wide);
            });
            [*value] = wide;
        }
    }

    pub(super) fn report(&self) -> SampleReport {
        SampleReport::new(self.places.clone(), &self.numbers, &self.ring)
    }
}
