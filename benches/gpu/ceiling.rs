//! The most a card can do: a plain sum, a plain scaling in place (`ceiling.cu`), and a copy.

use crate::clock::Clock;
use gradprobe::cudarc::{
    driver::{
        CudaFunction, CudaModule, CudaSlice, CudaStream, LaunchConfig, PushKernelArg,
        sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
    },
    nvrtc::compile_ptx,
};
use std::sync::Arc;

/// Bytes of a turn.
pub const BYTES: usize = 1 << 30;
/// Places that take turns: 4 GiB, far more than any cache holds.
const PLACES: usize = 4;
/// Threads of a multiprocessor, at most.
const THREADS: usize = 2048;

/// A kernel in some shape.
pub struct Shape {
    function: CudaFunction,
    config: LaunchConfig,
}

pub struct Ceiling {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    multiprocessors: u32,
    places: Vec<CudaSlice<u32>>,
    sums: CudaSlice<u32>,
}

impl Ceiling {
    pub fn new(stream: &Arc<CudaStream>) -> Self {
        let context = stream.context();
        let module = context.load_module(compile_ptx(include_str!("ceiling.cu")).unwrap()).unwrap();
        let multiprocessors = u32::try_from(context.attribute(MULTIPROCESSORS).unwrap()).unwrap();
        // Not zeros, which may be read faster.
        let words: Vec<u32> = (0u32..).take(BYTES / 4).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        let first = stream.clone_htod(&words).unwrap();
        let places = (0..PLACES).map(|_| stream.clone_dtod(&first).unwrap()).collect();
        let sums = stream.alloc_zeros(THREADS * multiprocessors as usize).unwrap();
        Self { stream: Arc::clone(stream), module, multiprocessors, places, sums }
    }

    /// Of the shapes of a kernel the one that runs fastest here.
    pub fn fastest(&mut self, clock: &Clock, kernel: &str, run: impl Fn(&mut Self, usize, &Shape)) -> Shape {
        let mut fastest = None;
        for (loads, threads) in [1, 2, 4, 8].into_iter().flat_map(|loads| [128, 256, 512].map(|t| (loads, t))) {
            let function = self.module.load_function(&format!("{kernel}_{loads}")).unwrap();
            let blocks = function.occupancy_max_active_blocks_per_multiprocessor(threads, 0, None).unwrap();
            let grid_dim = (blocks * self.multiprocessors, 1, 1);
            let shape =
                Shape { function, config: LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: 0 } };
            let mut times = clock.turns(13, |turn, begin| {
                begin();
                run(self, turn, &shape);
            });
            times.sort_unstable();
            let time = times[6];
            println!(
                "{kernel}, {loads} loads, {threads} threads: {:.2} TB/s",
                BYTES as f64 / time.as_secs_f64() / 1e12
            );
            if fastest.as_ref().is_none_or(|(known, _)| time < *known) {
                fastest = Some((time, shape));
            }
        }
        fastest.expect("there are shapes").1
    }

    /// Reads [`BYTES`].
    pub fn sum(&mut self, turn: usize, shape: &Shape) {
        let count = BYTES as u64 / 16;
        let mut launch = self.stream.launch_builder(&shape.function);
        launch.arg(&self.places[turn % PLACES]).arg(&count).arg(&mut self.sums);
        // SAFETY: it reads `count` times 16 bytes and writes a word a thread, of which no more than there are words for
        // fit on the card at once.
        unsafe { launch.launch(shape.config) }.unwrap();
    }

    /// Reads and writes [`BYTES`].
    pub fn scale(&mut self, turn: usize, shape: &Shape) {
        let (count, factor) = (BYTES as u64 / 16, 3u32);
        let mut launch = self.stream.launch_builder(&shape.function);
        launch.arg(&mut self.places[turn % PLACES]).arg(&count).arg(&factor);
        // SAFETY: it reads and writes `count` times 16 bytes.
        unsafe { launch.launch(shape.config) }.unwrap();
    }

    /// Reads and writes [`BYTES`], from one place to the next.
    pub fn copy(&mut self, turn: usize) {
        let [from, to] = self.places.get_disjoint_mut([turn % PLACES, (turn + 1) % PLACES]).unwrap();
        self.stream.memcpy_dtod(from, to).unwrap();
    }
}
