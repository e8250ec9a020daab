//! Sampled elements on a device: their table and ring, the launch that copies them, and the read-out.

use super::{Arguments, Device, DeviceProbe, Kernel, RawTensor, outside_capture, uploaded, values};
use crate::{Error, SampleConfig, SamplePlace, SampleReport};
use bytemuck::{Pod, Zeroable};

/// What the kernel is told (`kernels/arguments.cuh`).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Samples {
    places: u64,
    numbers: u64,
    ring: u64,
    count: u32,
    steps: u32,
}
const _: () = assert!(size_of::<Samples>() == 32);

/// Table and ring in device memory, and where the ring arrives on the host.
pub(super) struct SampleMemory<D: Device> {
    places: Vec<SamplePlace>,
    steps: usize,
    /// Numbers of the steps, then their values.
    ring: D::Buffer,
    read: D::Read,
    _tables: [D::Buffer; 2],
}

impl<D: Device> DeviceProbe<D> {
    /// Makes room for samples; those of before are forgotten. Allocates 16 bytes an element, 8 a step, and 4 an element
    /// and step of device memory; a graph captured before goes on without.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and the device's when it has not enough memory. What was kept before then stays.
    pub fn enable_samples(&mut self, config: &SampleConfig) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let places = config.places(&self.plan)?;
        let (steps, count) = (config.steps() as usize, places.len());
        let of_numbers = steps * size_of::<u64>();
        let out_of_memory = Error::OutOfMemory { bytes: usize::MAX };
        let of_values = steps.checked_mul(count * size_of::<f32>()).ok_or(out_of_memory)?;
        let table = uploaded(&self.device, bytemuck::cast_slice(&places))?;
        let mut ring = self.device.allocate(of_numbers + of_values)?;
        self.device.clear(&mut ring)?;
        let numbers = self.device.address(&ring);
        let samples = Samples {
            places: self.device.address(&table),
            numbers,
            ring: numbers + of_numbers as u64,
            count: u32::try_from(count).unwrap_or(u32::MAX),
            steps: config.steps(),
        };
        let tables = [uploaded(&self.device, bytemuck::bytes_of(&samples))?, table];
        let read = self.device.prepare_read(of_numbers + of_values)?;
        self.arguments = Arguments { samples: self.device.address(&tables[0]), ..self.arguments };
        self.samples = Some(SampleMemory { places, steps, ring, read, _tables: tables });
        Ok(())
    }

    /// Launches the copy of these tensors' sampled elements into the ring, as those of the step that was measured last.
    /// Does not wait.
    ///
    /// # Safety
    /// As for [`measure_raw`](Self::measure_raw).
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], those of [`bind_raw`](Self::bind_raw), and the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn sample_raw(&mut self, tensors: &[RawTensor]) -> Result<(), Error> {
        let memory = self.samples.as_ref().ok_or(NOT_ENABLED)?;
        let blocks = u32::try_from(memory.places.len().div_ceil(Kernel::THREADS as usize)).unwrap_or(u32::MAX);
        if !self.measured {
            return Err(Error::NotMeasured);
        }
        // SAFETY: the caller's promise is the same.
        unsafe { self.bind_raw(tensors) }?;
        self.device.launch(Kernel::Sample, self.blocks(Kernel::Sample, blocks), &self.arguments)
    }

    /// The sampled elements of the last steps. Waits for them.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::WaitInCapture`], or the device's.
    pub fn samples(&mut self) -> Result<SampleReport, Error> {
        outside_capture(&self.device, Error::WaitInCapture)?;
        let memory = self.samples.as_mut().ok_or(NOT_ENABLED)?;
        self.device.start_read(&memory.ring, &mut memory.read)?;
        let (numbers, ring) = self.device.complete(&memory.read)?.split_at(memory.steps * size_of::<u64>());
        let (numbers, ring) = (values(numbers).collect::<Vec<_>>(), values(ring).collect::<Vec<_>>());
        Ok(SampleReport::new(memory.places.clone(), &numbers, &ring))
    }
}

const NOT_ENABLED: Error = Error::NotEnabled { what: "samples" };
