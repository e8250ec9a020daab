//! Tensors that lie on the host, measured on the device: copied there, and back after a clip. For tools and tests; a
//! trainer's gradients are on the device already.

use super::{CudaProbe, driver::failed};
use crate::{
    AdaptiveClip, AdaptiveClipReport, Backend, DotReport, Error, GsnrConfig, GsnrReport, HistogramReport,
    HistoryReport, HostTensor, HostTensorMut, Plan, Report, SampleConfig, SampleReport, TensorSpec, health::Health,
    launch::RawTensor,
};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, result};
use std::sync::Arc;

/// Device memory with room for every tensor of a list, at its own distance from a multiple of 256 bytes.
pub(super) struct Staging {
    stream: Arc<CudaStream>,
    _memory: CudaSlice<u8>,
    starts: Vec<u64>,
}

impl Staging {
    const ALIGNMENT: u64 = 256;

    fn new(stream: &Arc<CudaStream>, plan: &Plan, size: impl Fn(&TensorSpec) -> usize) -> Result<Self, Error> {
        let mut starts = Vec::with_capacity(plan.tensors().len());
        let mut bytes = 0u64;
        for tensor in plan.tensors() {
            starts.push(bytes);
            // One alignment more than it needs: a tensor keeps its distance from a multiple of 16.
            bytes += (tensor.len * size(tensor) as u64).next_multiple_of(Self::ALIGNMENT) + Self::ALIGNMENT;
        }
        let size = usize::try_from(bytes.max(1)).map_err(|_| Error::OutOfMemory { bytes: usize::MAX })?;
        // SAFETY: only what was copied there is read.
        let memory = unsafe { stream.alloc::<u8>(size) }.map_err(failed("allocating device memory"))?;
        let address = memory.device_ptr(stream).0;
        starts.iter_mut().for_each(|start| *start += address);
        Ok(Self { stream: Arc::clone(stream), _memory: memory, starts })
    }

    /// Copies the tensors in, each as misaligned as it is on the host. The plan is theirs.
    fn upload<'a>(&self, tensors: impl Iterator<Item = HostTensor<'a>>) -> Result<Vec<RawTensor>, Error> {
        self.stream.context().bind_to_thread().map_err(failed("making the context current"))?;
        tensors
            .zip(&self.starts)
            .map(|(tensor, start)| {
                let bytes = tensor.as_bytes();
                let address = start + bytes.as_ptr() as u64 % 16;
                if !bytes.is_empty() {
                    // SAFETY: the tensor's room begins there and is large enough; pageable memory is copied on return.
                    unsafe { result::memcpy_htod_async(address, bytes, self.stream.cu_stream()) }
                        .map_err(failed("copying a tensor to the device"))?;
                }
                Ok(RawTensor { address, len: tensor.len() as u64, dtype: tensor.dtype() })
            })
            .collect()
    }
}

impl CudaProbe {
    fn upload<'a>(
        &mut self,
        tensors: impl ExactSizeIterator<Item = HostTensor<'a>> + Clone,
    ) -> Result<Vec<RawTensor>, Error> {
        self.plan().check(tensors.clone().map(|t| (t.dtype(), t.len() as u64)))?;
        if self.staging.is_none() {
            self.staging = Some(Staging::new(self.stream(), self.plan(), |tensor| tensor.dtype.size())?);
        }
        self.staging.as_ref().map_or(Ok(Vec::new()), |staging| staging.upload(tensors))
    }

    /// Copies the tensors back, and waits.
    fn download(&self, tensors: &mut [HostTensorMut<'_>], raw: &[RawTensor]) -> Result<(), Error> {
        for (tensor, raw) in tensors.iter_mut().zip(raw).filter(|(_, raw)| raw.len > 0) {
            // SAFETY: the tensor lies there, with that many bytes.
            unsafe { result::memcpy_dtoh_async(tensor.as_bytes_mut(), raw.address, self.stream().cu_stream()) }
                .map_err(failed("copying a tensor to the host"))?;
        }
        self.stream().synchronize().map_err(failed("waiting for the copies"))
    }

    /// A second list, of any dtypes: the other one of a dot product, or the weights.
    fn upload_others(&mut self, tensors: &[HostTensor<'_>]) -> Result<Vec<RawTensor>, Error> {
        self.plan().check_lengths(tensors.iter().map(|t| (t.dtype(), t.len() as u64)))?;
        if self.staging_of_others.is_none() {
            self.staging_of_others = Some(Staging::new(self.stream(), self.plan(), |_| size_of::<f32>())?);
        }
        self.staging_of_others.as_ref().map_or(Ok(Vec::new()), |staging| staging.upload(tensors.iter().copied()))
    }
}

impl Backend for CudaProbe {
    fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        self.set_loss_scale(scale)
    }

    fn enable_samples(&mut self, config: &SampleConfig) -> Result<(), Error> {
        self.probe.enable_samples(config)
    }

    fn sample_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error> {
        let raw = self.upload(tensors.iter().copied())?;
        // SAFETY: the staging memory holds the tensors just copied, on the same stream.
        unsafe { self.probe.sample_raw(&raw) }
    }

    fn samples(&mut self) -> Result<SampleReport, Error> {
        self.probe.samples()
    }

    fn judge_by(&mut self, health: &Health) -> Result<(), Error> {
        self.probe.judge_by(health)
    }

    fn enable_adaptive_clip(&mut self, clip: &AdaptiveClip) -> Result<(), Error> {
        self.probe.enable_adaptive_clip(clip)
    }

    fn clip_adaptively_host(
        &mut self,
        tensors: &mut [HostTensorMut<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<AdaptiveClipReport, Error> {
        let raw = self.upload(tensors.iter().map(HostTensorMut::as_ref))?;
        let weights = self.upload_others(weights)?;
        // SAFETY: the staging memory holds the tensors just copied, on the same stream, and is the probe's own.
        unsafe { self.probe.clip_adaptively_raw(&raw, &weights) }?;
        self.download(tensors, &raw)?;
        self.probe.adaptive_clip()
    }

    fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        self.probe.track(config)
    }

    fn reset_tracking(&mut self) -> Result<(), Error> {
        self.probe.reset_tracking()
    }

    fn gsnr(&mut self) -> Result<GsnrReport, Error> {
        self.probe.gsnr()
    }

    fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        self.probe.keep_history(steps)
    }

    fn tag(&mut self, tag: u64) -> Result<(), Error> {
        self.probe.tag(tag)
    }

    fn history(&mut self) -> Result<HistoryReport, Error> {
        self.probe.history()
    }

    fn enable_histogram(&mut self) -> Result<(), Error> {
        self.probe.enable_histogram()
    }

    fn histogram_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<HistogramReport, Error> {
        let raw = self.upload(tensors.iter().copied())?;
        // SAFETY: the staging memory holds the tensors just copied, on the same stream.
        unsafe { self.probe.histogram_raw(&raw) }
    }

    fn enable_dot(&mut self) -> Result<(), Error> {
        self.probe.enable_dot()
    }

    fn dot_host(&mut self, a: &[HostTensor<'_>], b: &[HostTensor<'_>]) -> Result<DotReport, Error> {
        let (a, b) = (self.upload(a.iter().copied())?, self.upload_others(b)?);
        // SAFETY: as above.
        unsafe { self.probe.dot_raw(&a, &b) }
    }

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        let raw = self.upload(tensors.iter().copied())?;
        // SAFETY: the staging memory holds the tensors just copied, on the same stream.
        unsafe { self.probe.measure_raw(&raw) }?;
        self.wait()
    }

    fn measure_host_with_weights(
        &mut self,
        tensors: &[HostTensor<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<Report, Error> {
        let (tensors, weights) = (self.upload(tensors.iter().copied())?, self.upload_others(weights)?);
        // SAFETY: as above.
        unsafe { self.probe.measure_with_weights_raw(&tensors, &weights) }?;
        self.wait()
    }

    fn clip_host(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
        let raw = self.upload(tensors.iter().map(HostTensorMut::as_ref))?;
        // SAFETY: as above, and the memory is the probe's own.
        unsafe { self.probe.clip_raw(&raw) }?;
        self.download(tensors, &raw)
    }
}
