//! Host tensors, and the one interface through which any backend measures and clips them.
//!
//! A trainer's loop uses a probe's own methods, which take the tensors where they are. [`Backend`] is for data on the
//! host, wherever the statistics are to be computed: the inspector, the tests and the benches are written over it.

use crate::{
    AdaptiveClip, AdaptiveClipReport, DType, DotReport, Element, Error, GsnrConfig, GsnrReport, HistogramReport,
    HistoryReport, Report, SampleConfig, SampleReport, dtype::sealed::Bits, health::Health,
};
use half::{bf16, f16};

/// Elements of one tensor on the host.
#[derive(Clone, Copy, Debug)]
pub enum HostTensor<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// f16 elements.
    F16(&'a [f16]),
    /// bf16 elements.
    BF16(&'a [bf16]),
}

/// Elements of one tensor on the host, to be changed in place.
#[derive(Debug)]
pub enum HostTensorMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// f16 elements.
    F16(&'a mut [f16]),
    /// bf16 elements.
    BF16(&'a mut [bf16]),
}

/// Evaluates `$body` with `$slice` bound to the slice in either enum, whatever its element type.
macro_rules! with_elements {
    ($kind:ident, $tensor:expr, $slice:ident => $body:expr) => {
        match $tensor {
            $kind::F32($slice) => $body,
            $kind::F16($slice) => $body,
            $kind::BF16($slice) => $body,
        }
    };
}
pub(crate) use with_elements;

fn dtype_of<E: Element>(_: &[E]) -> DType {
    E::DTYPE
}

impl HostTensor<'_> {
    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        with_elements!(HostTensor, self, slice => dtype_of(slice))
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        with_elements!(HostTensor, self, slice => slice.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        with_elements!(HostTensor, self, slice => bytemuck::cast_slice(slice))
    }

    /// The exact values of the elements in f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut wide = vec![0.0; self.len()];
        with_elements!(HostTensor, self, slice => Bits::widen_slice(slice, &mut wide));
        wide
    }
}

impl HostTensorMut<'_> {
    /// The same elements, to be read.
    pub fn as_ref(&self) -> HostTensor<'_> {
        match self {
            Self::F32(slice) => HostTensor::F32(slice),
            Self::F16(slice) => HostTensor::F16(slice),
            Self::BF16(slice) => HostTensor::BF16(slice),
        }
    }

    /// The elements as bytes.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        with_elements!(HostTensorMut, self, slice => bytemuck::cast_slice_mut(slice))
    }
}

macro_rules! from_slice {
    ($element:ty, $variant:ident) => {
        impl<'a> From<&'a [$element]> for HostTensor<'a> {
            fn from(elements: &'a [$element]) -> Self {
                Self::$variant(elements)
            }
        }
        impl<'a> From<&'a mut [$element]> for HostTensorMut<'a> {
            fn from(elements: &'a mut [$element]) -> Self {
                Self::$variant(elements)
            }
        }
    };
}
from_slice!(f32, F32);
from_slice!(f16, F16);
from_slice!(bf16, BF16);

/// Measures and clips tensors that lie on the host, with the results at hand when a call returns.
pub trait Backend {
    /// `cpu`, `cuda` or `simt`.
    fn name(&self) -> &'static str;

    /// The statistics of these tensors, in the plan's order.
    ///
    /// # Errors
    /// When the tensors are not those of the plan, or the device fails.
    fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error>;

    /// The statistics of these tensors and of the weights whose gradients they are, both in the plan's order.
    ///
    /// # Errors
    /// [`Error::NoWeights`], and as [`measure_host`](Self::measure_host).
    fn measure_host_with_weights(
        &mut self,
        tensors: &[HostTensor<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<Report, Error>;

    /// Clips these tensors by what the last measurement decided.
    ///
    /// # Errors
    /// As [`measure_host`](Self::measure_host), and [`Error::NotMeasured`].
    fn clip_host(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error>;

    /// Tracks tensors across the steps from now on; what was tracked before is forgotten.
    ///
    /// # Errors
    /// Those of [`GsnrConfig::bytes`], and [`Error::OutOfMemory`].
    fn track(&mut self, config: &GsnrConfig) -> Result<(), Error>;

    /// Forgets all steps that were tracked.
    ///
    /// # Errors
    /// [`Error::NotTracked`].
    fn reset_tracking(&mut self) -> Result<(), Error>;

    /// Signal and noise of the tracked tensors, up to the last step.
    ///
    /// # Errors
    /// [`Error::NotTracked`], [`Error::TooFewSteps`], or the device's.
    fn gsnr(&mut self) -> Result<GsnrReport, Error>;

    /// Keeps the last steps from now on, this many; what was kept before is forgotten.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0 steps, [`Error::OutOfMemory`].
    fn keep_history(&mut self, steps: u32) -> Result<(), Error>;

    /// Names the batch of the measurements that follow, for the history.
    ///
    /// # Errors
    /// [`Error::NoHistory`], or the device's.
    fn tag(&mut self, tag: u64) -> Result<(), Error>;

    /// The last steps.
    ///
    /// # Errors
    /// [`Error::NoHistory`], or the device's.
    fn history(&mut self) -> Result<HistoryReport, Error>;

    /// Makes room for histograms: [`Histogram::bytes`](crate::Histogram::bytes).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn enable_histogram(&mut self) -> Result<(), Error>;

    /// The histograms of these tensors, in the plan's order.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], and as [`measure_host`](Self::measure_host).
    fn histogram_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<HistogramReport, Error>;

    /// Has every measurement from now on judge its step by the threshold rules of `health`.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`], [`Error::InvalidConfig`] for more than 63 rules, [`Error::OutOfMemory`].
    fn judge_by(&mut self, health: &Health) -> Result<(), Error>;

    /// Sets the loss scale of the next step.
    ///
    /// # Errors
    /// [`Error::NoLossScale`], [`Error::InvalidConfig`], or the device's.
    fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error>;

    /// Makes room for samples.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::OutOfMemory`].
    fn enable_samples(&mut self, config: &SampleConfig) -> Result<(), Error>;

    /// Keeps the sampled elements of these tensors, as those of the step that was measured last.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], and as [`measure_host`](Self::measure_host).
    fn sample_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error>;

    /// The sampled elements of the last steps.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], or the device's.
    fn samples(&mut self) -> Result<SampleReport, Error>;

    /// Makes room for adaptive clips by this rule.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::TensorCount`], [`Error::UnitLength`], [`Error::OutOfMemory`].
    fn enable_adaptive_clip(&mut self, clip: &AdaptiveClip) -> Result<(), Error>;

    /// Clips these tensors unit by unit, by the norms of the weights whose gradients they are, and says what it did.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], and as [`measure_host`](Self::measure_host).
    fn clip_adaptively_host(
        &mut self,
        tensors: &mut [HostTensorMut<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<AdaptiveClipReport, Error>;

    /// Makes room for dot products: [`DotReport::bytes`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn enable_dot(&mut self) -> Result<(), Error>;

    /// The dot products of the plan's tensors `a` and the tensors `b`, of the same lengths and any dtypes.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], and as [`measure_host`](Self::measure_host).
    fn dot_host(&mut self, a: &[HostTensor<'_>], b: &[HostTensor<'_>]) -> Result<DotReport, Error>;
}
