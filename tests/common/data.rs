//! Tensors made from seeds: what the cases are filled with.
//!
//! Data come from a seed and a counter, element by element, through additions, multiplications and divisions of f64
//! only: the same bits on every machine.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // Small by design.

use super::oracle::{Format, power_of_two};
use bytemuck::Zeroable;
use gradprobe::{DType, HostTensor, HostTensorMut};
use half::{bf16, f16};
use std::sync::Arc;

/// A tensor yet to be made.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: DType,
    pub len: usize,
    bits: Arc<dyn Fn(usize) -> u32 + Send + Sync>,
}

/// The elements of a tensor.
#[derive(Clone, Debug)]
pub enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Tensor {
    /// Elements with these bits.
    pub fn of_bits(dtype: DType, len: usize, bits: impl Fn(usize) -> u32 + Send + Sync + 'static) -> Self {
        Self { dtype, len, bits: Arc::new(bits) }
    }

    /// Elements nearest to these values; what the dtype cannot hold becomes its largest finite number.
    pub fn of_values(dtype: DType, len: usize, value: impl Fn(usize) -> f64 + Send + Sync + 'static) -> Self {
        Self::of_bits(dtype, len, move |i| nearest(dtype, value(i)))
    }

    pub fn empty(dtype: DType) -> Self {
        Self::of_bits(dtype, 0, |_| 0)
    }

    /// This tensor with the element at `index` replaced.
    pub fn with(self, index: usize, bits: u32) -> Self {
        let others = self.bits;
        Self { bits: Arc::new(move |i| if i == index { bits } else { others(i) }), ..self }
    }

    pub fn data(&self) -> Data {
        Data::of_bits(self.dtype, (0..self.len).map(|i| (self.bits)(i)))
    }
}

impl From<HostTensor<'_>> for Data {
    fn from(tensor: HostTensor<'_>) -> Self {
        match tensor {
            HostTensor::F32(elements) => Self::F32(elements.to_vec()),
            HostTensor::F16(elements) => Self::F16(elements.to_vec()),
            HostTensor::BF16(elements) => Self::BF16(elements.to_vec()),
        }
    }
}

impl Data {
    pub fn of_bits(dtype: DType, bits: impl Iterator<Item = u32>) -> Self {
        match dtype {
            DType::F32 => Self::F32(bits.map(f32::from_bits).collect()),
            DType::F16 => Self::F16(bits.map(|b| f16::from_bits(b as u16)).collect()),
            DType::BF16 => Self::BF16(bits.map(|b| bf16::from_bits(b as u16)).collect()),
        }
    }

    pub fn dtype(&self) -> DType {
        self.tensor().dtype()
    }

    pub fn len(&self) -> usize {
        self.tensor().len()
    }

    pub fn tensor(&self) -> HostTensor<'_> {
        match self {
            Self::F32(elements) => HostTensor::F32(elements),
            Self::F16(elements) => HostTensor::F16(elements),
            Self::BF16(elements) => HostTensor::BF16(elements),
        }
    }

    pub fn tensor_mut(&mut self) -> HostTensorMut<'_> {
        match self {
            Self::F32(elements) => HostTensorMut::F32(elements),
            Self::F16(elements) => HostTensorMut::F16(elements),
            Self::BF16(elements) => HostTensorMut::BF16(elements),
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::F32(elements) => bytemuck::cast_slice(elements),
            Self::F16(elements) => bytemuck::cast_slice(elements),
            Self::BF16(elements) => bytemuck::cast_slice(elements),
        }
    }

    /// The bits of each element.
    pub fn bits(&self) -> impl Iterator<Item = u32> {
        (0..self.len()).map(move |i| match self {
            Self::F32(elements) => elements[i].to_bits(),
            Self::F16(elements) => elements[i].to_bits().into(),
            Self::BF16(elements) => elements[i].to_bits().into(),
        })
    }

    /// As many NaNs.
    pub fn all_nan(&self) -> Self {
        Self::of_bits(self.dtype(), (0..self.len()).map(|_| u32::MAX))
    }

    /// The same numbers in f32.
    pub fn widened(&self) -> Self {
        let format = Format::of(self.dtype());
        Self::of_bits(DType::F32, self.bits().map(|bits| Format::F32.encode(format.value(bits))))
    }

    /// `len` zeros.
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::F16 => Self::F16(vec![f16::zeroed(); len]),
            DType::BF16 => Self::BF16(vec![bf16::zeroed(); len]),
        }
    }
}

/// Bits of the nearest finite number of this dtype.
pub fn nearest(dtype: DType, value: f64) -> u32 {
    let format = Format::of(dtype);
    let largest = format.value(format.infinity() - 1);
    format.encode(value.clamp(-largest, largest))
}

/// 64 random bits for a place in a stream (splitmix64 at a counter).
pub fn hash(seed: u64, index: usize) -> u64 {
    let mut z =
        (index as u64).wrapping_add(seed.wrapping_mul(0xd134_2543_de82_ef95)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Uniform in [0, 1).
pub fn uniform(seed: u64, index: usize) -> f64 {
    (hash(seed, index) >> 11) as f64 * power_of_two(-53)
}

/// Nearly normal with mean 0 and standard deviation 1: twelve uniforms less six.
pub fn normal(seed: u64, index: usize) -> f64 {
    let twelve = (0..3).map(|k| hash(seed ^ (k << 56), index)).flat_map(|h| [h, h >> 16, h >> 32, h >> 48]);
    twelve.map(|h| (h & 0xffff) as f64).sum::<f64>() / 65536.0 - 6.0
}

/// ±2^(`octaves` · a normal number), with the power made of straight lines.
pub fn lognormal(seed: u64, index: usize, octaves: f64) -> f64 {
    let exponent = octaves * normal(seed, index);
    let whole = exponent.floor();
    let sign = if hash(!seed, index) & 1 == 0 { 1.0 } else { -1.0 };
    sign * (1.0 + exponent - whole) * power_of_two(whole as i32)
}

/// The quotient of two normal numbers.
pub fn cauchy(seed: u64, index: usize) -> f64 {
    let below = normal(!seed, index);
    normal(seed, index) / if below == 0.0 { 1.0 } else { below }
}

/// A random bit pattern, whatever it means.
pub fn random_bits(dtype: DType, seed: u64, index: usize) -> u32 {
    let sign = Format::of(dtype).sign();
    (hash(seed, index) >> 32) as u32 & (sign | (sign - 1))
}

/// A random bit pattern of a finite number.
pub fn random_finite_bits(dtype: DType, seed: u64, index: usize) -> u32 {
    let format = Format::of(dtype);
    let magnitude = hash(seed, index) % u64::from(format.infinity());
    magnitude as u32 | if hash(!seed, index) & 1 == 0 { 0 } else { format.sign() }
}
