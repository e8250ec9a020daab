//! The tensors that a step is given: on the host, on a device, or absent.

use crate::{DType, Element, Error, dtype::sealed::Bits};
#[cfg(feature = "cuda")]
use cudarc::driver::{CudaStream, SyncOnDrop};
use half::{bf16, f16};
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// Where a device's kernels find tensors.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Place {
    /// In memory of the host.
    Host,
    /// In memory of a CUDA device, with uses ordered on this stream.
    #[cfg(feature = "cuda")]
    Stream(Arc<CudaStream>),
}

/// Gives a probe elements to read. Implemented by `&[E]`, `Vec<E>`, `[E; N]` and [`HostTensor`] on the host; by
/// `CudaSlice<E>`, `CudaView<E>` and `CudaViewMut<E>` on a CUDA device, for each [`Element`] `E`; by [`RawTensor`] for
/// any other memory; and by [`Absent`], or `None`, for a tensor without a gradient in this step.
///
/// A probe on a CUDA device copies tensors of the host there and, after a clip, back, and waits for the copies: for
/// tools and tests.
///
/// # Safety
/// `shape` is the same as long as the value is borrowed. `lend` gives the address of so many initialised elements of
/// that type. The kernels of `place` may read that memory until the `Lent` is finished or dropped and, on a stream,
/// until the work launched before that has run.
#[allow(unsafe_code, reason = "kernels trust the addresses")]
pub unsafe trait Tensor {
    /// Type and number of the elements; `None` for an absent tensor.
    fn shape(&self) -> Option<(DType, u64)>;

    /// Lends the elements to the kernels that are launched next, to be read.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] when the kernels cannot reach them, or the driver's.
    fn lend<'a>(&'a self, place: &'a Place) -> Result<Lent<'a>, Error>;
}

/// Gives a probe elements to change in place. Implemented by `Vec<E>`, `[E; N]`, `&mut [E]`, [`HostTensorMut`],
/// `CudaSlice<E>`, `CudaViewMut<E>`, [`RawTensor`] and [`Absent`].
///
/// # Safety
/// As of [`Tensor`]. The memory that `lend_mut` gives may be written as well as read.
#[allow(unsafe_code, reason = "kernels trust the addresses")]
pub unsafe trait TensorMut: Tensor {
    /// Lends the elements to the kernels that are launched next, to be changed.
    ///
    /// # Errors
    /// As [`Tensor::lend`].
    fn lend_mut<'a>(&'a mut self, place: &'a Place) -> Result<Lent<'a>, Error>;
}

/// A tensor lent to kernels.
#[derive(Debug)]
pub struct Lent<'a> {
    /// Address of the first element; 0 when there is none.
    pub(crate) address: u64,
    pub(crate) until: Until<'a>,
}

/// The work left once the launches are queued.
#[derive(Debug)]
pub(crate) enum Until<'a> {
    Nothing(std::marker::PhantomData<&'a ()>),
    /// cudarc's record of the use, made when it is dropped, and the stream of that use.
    #[cfg(feature = "cuda")]
    Noted(SyncOnDrop<'a>, &'a CudaStream),
    /// The copy of a tensor that lies on the host.
    #[cfg(feature = "cuda")]
    Copied(Box<crate::cuda::Copied<'a>>),
}

impl<'a> Lent<'a> {
    /// Lends memory whose use needs no record.
    pub(crate) fn at(address: u64) -> Self {
        Self { address, until: Until::Nothing(std::marker::PhantomData) }
    }

    /// Lends memory whose use cudarc records.
    #[cfg(feature = "cuda")]
    pub(crate) fn noted(address: u64, note: SyncOnDrop<'a>, stream: &'a CudaStream) -> Self {
        match note {
            // The context has one stream, or tracks no events.
            SyncOnDrop::Record(None) => Self::at(address),
            note => Self { address, until: Until::Noted(note, stream) },
        }
    }

    /// Whether work is left once the launches are queued.
    pub(crate) fn is_pending(&self) -> bool {
        !matches!(self.until, Until::Nothing(_))
    }

    /// Does the work that is left once the launches are queued.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.until {
            #[cfg(feature = "cuda")]
            Until::Noted(note, stream) => crate::cuda::note(note, stream),
            #[cfg(feature = "cuda")]
            Until::Copied(copied) => copied.finish(),
            Until::Nothing(_) => Ok(()),
        }
    }

    fn of_host(bytes: &'a [u8], place: &'a Place) -> Result<Self, Error> {
        match place {
            Place::Host => Ok(Self::at(bytes.as_ptr() as u64)),
            #[cfg(feature = "cuda")]
            Place::Stream(stream) => crate::cuda::Copied::of(bytes, stream),
        }
    }

    fn of_host_mut(bytes: &'a mut [u8], place: &'a Place) -> Result<Self, Error> {
        match place {
            Place::Host => Ok(Self::at(bytes.as_mut_ptr() as u64)),
            #[cfg(feature = "cuda")]
            Place::Stream(stream) => crate::cuda::Copied::of_mut(bytes, stream),
        }
    }
}

/// Stands for a tensor without a gradient in this step. Its record is empty, and no norm counts it as 0. The state kept
/// of the tensor stays: history, tracked elements, ranks and captured graphs go on.
///
/// ```
/// use gradprobe::{Absent, Config, Cpu, DType, Plan, Probe};
///
/// let plan = Plan::new([("expert.0", DType::F32, 2), ("expert.1", DType::F32, 2)])?;
/// let mut probe = Probe::new(Cpu, plan, Config::new())?;
/// probe.measure(&[&[3.0f32, 4.0], &Absent])?;
/// let report = probe.wait()?;
/// assert_eq!(report.absent().collect::<Vec<_>>(), ["expert.1"]);
/// assert_eq!(report.outputs().total_norm, 5.0);
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Absent;

// SAFETY: there are no elements.
#[allow(unsafe_code, reason = "implements a trait for what has no elements")]
unsafe impl Tensor for Absent {
    fn shape(&self) -> Option<(DType, u64)> {
        None
    }
    fn lend<'a>(&'a self, _: &'a Place) -> Result<Lent<'a>, Error> {
        Ok(Lent::at(0))
    }
}

// SAFETY: as above.
#[allow(unsafe_code, reason = "implements a trait for what has no elements")]
unsafe impl TensorMut for Absent {
    fn lend_mut<'a>(&'a mut self, _: &'a Place) -> Result<Lent<'a>, Error> {
        Ok(Lent::at(0))
    }
}

// SAFETY: the tensor's own, or no elements.
#[allow(unsafe_code, reason = "passes a trait on")]
unsafe impl<T: Tensor> Tensor for Option<T> {
    fn shape(&self) -> Option<(DType, u64)> {
        self.as_ref().and_then(T::shape)
    }
    fn lend<'a>(&'a self, place: &'a Place) -> Result<Lent<'a>, Error> {
        self.as_ref().map_or(Ok(Lent::at(0)), |tensor| tensor.lend(place))
    }
}

// SAFETY: the tensor's own, or no elements.
#[allow(unsafe_code, reason = "passes a trait on")]
unsafe impl<T: TensorMut> TensorMut for Option<T> {
    fn lend_mut<'a>(&'a mut self, place: &'a Place) -> Result<Lent<'a>, Error> {
        self.as_mut().map_or(Ok(Lent::at(0)), |tensor| tensor.lend_mut(place))
    }
}

/// A tensor by its address, length and dtype: for trainers with memory that no other type here describes.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, RawTensor};
///
/// let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new())?;
/// let gradient = [3.0f32, 4.0]; // with a CUDA device, memory of that device
/// // SAFETY: two f32 lie at the address, and nothing changes them until the report is there.
/// let tensor = unsafe { RawTensor::new(gradient.as_ptr() as u64, 2, DType::F32) };
/// probe.measure(&[&tensor])?;
/// assert_eq!(probe.wait()?.outputs().total_norm, 5.0);
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTensor {
    pub(crate) address: u64,
    pub(crate) len: u64,
    pub(crate) dtype: DType,
}

impl RawTensor {
    /// Describes `len` elements of type `dtype` from this address on, in memory of the probe's device. The address is
    /// not used when `len` is 0.
    ///
    /// # Safety
    /// As long as the value is given to probes, and until the work they launched with it has run:
    /// * the elements are initialised, and in memory that the probe's device can read from its context;
    /// * every write to them is ordered before or after the launch, by the probe's stream or by events;
    /// * they are not freed;
    /// * in a call that changes tensors, the memory is writable, and every other use of it is ordered in the same way.
    #[allow(unsafe_code, reason = "the address is the caller's word")]
    pub const unsafe fn new(address: u64, len: u64, dtype: DType) -> Self {
        Self { address, len, dtype }
    }

    /// Address of the first element.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Bytes of the elements.
    pub const fn bytes(&self) -> u64 {
        self.len * self.dtype.size() as u64
    }
}

// SAFETY: its maker's promise is the same.
#[allow(unsafe_code, reason = "its maker vouches for it")]
unsafe impl Tensor for RawTensor {
    fn shape(&self) -> Option<(DType, u64)> {
        Some((self.dtype, self.len))
    }
    fn lend<'a>(&'a self, _: &'a Place) -> Result<Lent<'a>, Error> {
        Ok(Lent::at(self.address))
    }
}

// SAFETY: its maker's promise is the same.
#[allow(unsafe_code, reason = "its maker vouches for it")]
unsafe impl TensorMut for RawTensor {
    fn lend_mut<'a>(&'a mut self, _: &'a Place) -> Result<Lent<'a>, Error> {
        Ok(Lent::at(self.address))
    }
}

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

/// Evaluates `$body` with `$slice` bound to the slice in either enum, for any element type.
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

// SAFETY: a borrowed slice on the host.
#[allow(unsafe_code, reason = "lends borrowed memory")]
unsafe impl Tensor for HostTensor<'_> {
    fn shape(&self) -> Option<(DType, u64)> {
        Some((self.dtype(), self.len() as u64))
    }
    fn lend<'a>(&'a self, place: &'a Place) -> Result<Lent<'a>, Error> {
        Lent::of_host(self.as_bytes(), place)
    }
}

// SAFETY: as above.
#[allow(unsafe_code, reason = "lends borrowed memory")]
unsafe impl Tensor for HostTensorMut<'_> {
    fn shape(&self) -> Option<(DType, u64)> {
        self.as_ref().shape()
    }
    fn lend<'a>(&'a self, place: &'a Place) -> Result<Lent<'a>, Error> {
        let bytes = with_elements!(HostTensorMut, self, slice => bytemuck::cast_slice(slice));
        Lent::of_host(bytes, place)
    }
}

// SAFETY: a mutably borrowed slice on the host.
#[allow(unsafe_code, reason = "lends borrowed memory")]
unsafe impl TensorMut for HostTensorMut<'_> {
    fn lend_mut<'a>(&'a mut self, place: &'a Place) -> Result<Lent<'a>, Error> {
        Lent::of_host_mut(self.as_bytes_mut(), place)
    }
}

macro_rules! host_slices {
    (read: $([$($generics:tt)*] $tensor:ty),*; change: $([$($generics_mut:tt)*] $tensor_mut:ty),*) => {
        $(
            // SAFETY: elements on the host, borrowed with the value.
            #[allow(unsafe_code, reason = "lends borrowed memory")]
            unsafe impl<E: Element, $($generics)*> Tensor for $tensor {
                fn shape(&self) -> Option<(DType, u64)> {
                    Some((E::DTYPE, self.len() as u64))
                }
                fn lend<'a>(&'a self, place: &'a Place) -> Result<Lent<'a>, Error> {
                    Lent::of_host(bytemuck::cast_slice::<E, u8>(self), place)
                }
            }
        )*
        $(
            // SAFETY: the same, borrowed mutably.
            #[allow(unsafe_code, reason = "lends borrowed memory")]
            unsafe impl<E: Element, $($generics_mut)*> TensorMut for $tensor_mut {
                fn lend_mut<'a>(&'a mut self, place: &'a Place) -> Result<Lent<'a>, Error> {
                    Lent::of_host_mut(bytemuck::cast_slice_mut::<E, u8>(self), place)
                }
            }
        )*
    };
}
host_slices! {
    read: [] Vec<E>, [const N: usize] [E; N], [] &[E], [] &mut [E];
    change: [] Vec<E>, [const N: usize] [E; N], [] &mut [E]
}
