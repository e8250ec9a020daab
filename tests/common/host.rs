//! A probe on any device, for tensors that lie on the host: each call waits for what it gives.

#![allow(dead_code)] // Each test file uses a part of this.
#![allow(unsafe_code, reason = "reads results where a kernel would")]

use gradprobe::{
    Error, HostTensor, HostTensorMut, Probe, Report, Tensor, TensorMut, clip::AdaptiveClipReport, dot::DotReport,
    gsnr::GsnrReport, histogram::HistogramReport, history::HistoryReport, samples::SampleReport,
};

/// The tensors, as probes take them.
pub fn refs<'a>(tensors: &'a [HostTensor<'_>]) -> Vec<&'a dyn Tensor> {
    tensors.iter().map(|tensor| tensor as &dyn Tensor).collect()
}

/// The same, to be changed.
pub fn refs_mut<'a, 'b: 'a>(tensors: &'a mut [HostTensorMut<'b>]) -> Vec<&'a mut dyn TensorMut> {
    tensors.iter_mut().map(|tensor| tensor as &mut dyn TensorMut).collect()
}

/// What a probe says of tensors on the host, at once. The tests of the tests replace some of it by something wrong.
pub trait OnHost {
    fn probe(&mut self) -> &mut Probe;

    fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        self.probe().measure(&refs(tensors))?;
        self.probe().wait()
    }

    fn measure_host_with_weights(
        &mut self,
        tensors: &[HostTensor<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<Report, Error> {
        self.probe().measure_with_weights(&refs(tensors), &refs(weights))?;
        self.probe().wait()
    }

    fn clip_host(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
        self.probe().clip(&mut refs_mut(tensors))
    }

    fn clip_adaptively_host(
        &mut self,
        tensors: &mut [HostTensorMut<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<AdaptiveClipReport, Error> {
        let mut room = self.probe().adaptive_clip()?;
        room.clip(&mut refs_mut(tensors), &refs(weights))?;
        room.report()
    }

    fn sample_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error> {
        self.probe().samples()?.take(&refs(tensors))
    }

    fn histogram_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<HistogramReport, Error> {
        self.probe().histogram()?.measure(&refs(tensors))
    }

    fn dot_host(&mut self, a: &[HostTensor<'_>], b: &[HostTensor<'_>]) -> Result<DotReport, Error> {
        self.probe().dot()?.measure(&refs(a), &refs(b))
    }

    fn gsnr_report(&mut self) -> Result<GsnrReport, Error> {
        self.probe().gsnr()?.report()
    }

    fn gsnr_reset(&mut self) -> Result<(), Error> {
        self.probe().gsnr()?.reset()
    }

    fn history_report(&mut self) -> Result<HistoryReport, Error> {
        self.probe().history()?.report()
    }

    fn sample_report(&mut self) -> Result<SampleReport, Error> {
        self.probe().samples()?.report()
    }
}

impl OnHost for Probe {
    fn probe(&mut self) -> &mut Probe {
        self
    }
}

/// The coefficients of the tensors, which a probe on the host leaves for optimizers.
pub fn coefficients(probe: &Probe) -> Vec<f32> {
    let (address, count) = (probe.addresses().coefficients, probe.plan().tensors().len());
    // SAFETY: the probe has so many there, and runs nothing meanwhile.
    unsafe { std::slice::from_raw_parts(address as *const f32, count) }.to_vec()
}

/// Where a probe on the host has the loss scale of the next step.
pub fn loss_scale(probe: &Probe) -> Option<f32> {
    // SAFETY: as above.
    probe.addresses().loss_scale.map(|address| unsafe { *(address as *const f32) })
}

/// A plan for these tensors under these names.
pub fn plan_of<'a, N: Into<String>>(
    tensors: impl IntoIterator<Item = (N, HostTensor<'a>)>,
) -> Result<gradprobe::Plan, Error> {
    gradprobe::Plan::new(tensors.into_iter().map(|(name, tensor)| (name, tensor.dtype(), tensor.len() as u64)))
}
