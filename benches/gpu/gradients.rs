//! The data that our kernels and other libraries (`peers.py`) are timed on.

use gradprobe::{
    Element, RawTensor,
    cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr},
};
use rayon::prelude::*;
use std::sync::Arc;

/// Elements of a tensor before they repeat.
const TILE: usize = 1 << 20;

/// Element `index` of tensor `tensor`, the same as in peers.py: the sum of the four 16-bit parts of a hash, less its
/// mean, times 2^-25: exact in f32, with a standard deviation of 1.13e-3.
fn element(tensor: usize, index: usize) -> f32 {
    let mut z = ((tensor as u64) << 40 | index as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let parts = [z, z >> 16, z >> 32, z >> 48].map(|part| (part & 0xffff) as f32);
    (parts.iter().sum::<f32>() - 131_070.0) / (1 << 25) as f32
}

/// 290 tensors, 2^30 elements: 48 blocks 1280 wide, embeddings of 2048 positions and of the tokens that remain.
pub fn transformer_lengths() -> Vec<usize> {
    let width = 1280;
    let square = width * width;
    let block = [width, 3 * square, square, width, 4 * square, 4 * square];
    let rest: Vec<usize> = std::iter::once(2048 * width).chain((0..48).flat_map(|_| block)).collect();
    std::iter::once((1 << 30) - rest.iter().sum::<usize>()).chain(rest).collect()
}

/// Tensors one after the other in device memory, in several places.
pub struct Gradients<T> {
    stream: Arc<CudaStream>,
    lengths: Vec<usize>,
    /// Elements before the first tensor.
    offset: usize,
    /// What a clip is undone from; never measured itself.
    kept: CudaSlice<T>,
    places: Vec<CudaSlice<T>>,
    norm: f64,
}

impl<T: Element + DeviceRepr + Into<f32>> Gradients<T> {
    /// Tensors of these lengths, converted from f32, in so many places. The first begins `offset` elements into its
    /// allocation.
    pub fn new(
        stream: &Arc<CudaStream>,
        lengths: Vec<usize>,
        places: usize,
        offset: usize,
        convert: impl Fn(f32) -> T + Sync,
    ) -> Self {
        let tensor = |(t, &length): (usize, &usize)| {
            let tile: Vec<T> = (0..length.min(TILE)).map(|i| convert(element(t, i))).collect();
            tile.into_iter().cycle().take(length).collect::<Vec<T>>()
        };
        let mut data = vec![convert(0.0); offset];
        data.par_extend(lengths.par_iter().enumerate().flat_map_iter(tensor));
        let square = |&x: &T| f64::from(Into::<f32>::into(x)).powi(2);
        let norm = data.par_iter().map(square).sum::<f64>().sqrt();
        let kept = stream.clone_htod(&data).unwrap();
        let places = (0..places).map(|_| stream.clone_dtod(&kept).unwrap()).collect();
        Self { stream: Arc::clone(stream), lengths, offset, kept, places, norm }
    }

    /// Bytes of all tensors, in one place.
    pub fn bytes(&self) -> u64 {
        (self.lengths.iter().sum::<usize>() * size_of::<T>()) as u64
    }

    /// How many places there are.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// The tensors in a place.
    pub fn tensors(&self, place: usize) -> Vec<RawTensor> {
        let mut address = self.places[place].device_ptr(&self.stream).0 + (self.offset * size_of::<T>()) as u64;
        let tensor = |&len: &usize| {
            // SAFETY: the place is as long as all tensors; those who launch keep it, and use it on its stream alone.
            let tensor = unsafe { RawTensor::new(address, len as u64, T::DTYPE) };
            address += (len * size_of::<T>()) as u64;
            tensor
        };
        self.lengths.iter().map(tensor).collect()
    }

    /// The norm that is this share of the data's own.
    pub fn max_norm(&self, share: f64) -> f64 {
        share * self.norm
    }

    /// Undoes the clip in a place.
    pub fn restore(&mut self, place: usize) {
        self.stream.memcpy_dtod(&self.kept, &mut self.places[place]).unwrap();
    }
}
