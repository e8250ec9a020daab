//! The elements of one tensor: in a mapped file, or owned and aligned for their type.

use bytemuck::try_cast_slice;
use gradprobe::{DType, Error, HostTensor, HostTensorMut};
use half::{bf16, f16};

/// One tensor's elements, to be read.
pub enum Lent<'a> {
    /// In the file's pages, which the system reads when they are used and may drop again.
    Mapped(HostTensor<'a>),
    Read(Elements),
}

impl Lent<'_> {
    pub fn view(&self) -> HostTensor<'_> {
        match self {
            Self::Mapped(tensor) => *tensor,
            Self::Read(elements) => elements.view(),
        }
    }
}

/// Gives these bytes as elements; `None` where they are not aligned for that.
pub fn mapped(dtype: DType, bytes: &[u8]) -> Option<HostTensor<'_>> {
    match dtype {
        DType::F32 => try_cast_slice(bytes).ok().map(HostTensor::F32),
        DType::F16 => try_cast_slice(bytes).ok().map(HostTensor::F16),
        DType::BF16 => try_cast_slice(bytes).ok().map(HostTensor::BF16),
    }
}

/// One tensor's elements, owned.
pub enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Elements {
    /// Makes `len` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn zeros(dtype: DType, len: u64) -> Result<Self, Error> {
        Ok(match dtype {
            DType::F32 => Self::F32(zeros(len, 0.0)?),
            DType::F16 => Self::F16(zeros(len, f16::ZERO)?),
            DType::BF16 => Self::BF16(zeros(len, bf16::ZERO)?),
        })
    }

    pub fn view(&self) -> HostTensor<'_> {
        match self {
            Self::F32(elements) => HostTensor::F32(elements),
            Self::F16(elements) => HostTensor::F16(elements),
            Self::BF16(elements) => HostTensor::BF16(elements),
        }
    }

    pub fn view_mut(&mut self) -> HostTensorMut<'_> {
        match self {
            Self::F32(elements) => HostTensorMut::F32(elements),
            Self::F16(elements) => HostTensorMut::F16(elements),
            Self::BF16(elements) => HostTensorMut::BF16(elements),
        }
    }
}

fn zeros<T: Copy>(len: u64, zero: T) -> Result<Vec<T>, Error> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut elements = Vec::new();
    let out_of_memory = |_| Error::OutOfMemory { bytes: (len as u64).saturating_mul(size_of::<T>() as u64) };
    elements.try_reserve_exact(len).map_err(out_of_memory)?;
    elements.resize(len, zero);
    Ok(elements)
}
