//! Dot products on a device: their memory, the second list's table, the launch, and the read-out.

use super::{Dot, DotReport};
use crate::{
    Config, Error, Probe, Tensor,
    device::Buffer,
    features::Feature,
    probe::{Common, Core, Mirrored, Other, Planned, ReadBack, Room, outside_capture, values},
};
use bytemuck::{Pod, Zeroable};

/// The arguments of [`Kernel::Dot`](crate::device::Kernel::Dot).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct DotArguments {
    pub common: Common,
    /// Table of the second list: [`Other`].
    pub others: u64,
    /// One [`Dot`] a chunk: workspace.
    chunk_dots: u64,
    /// One [`Dot`] a tensor: a result.
    pub dots: u64,
}
// The other side is in kernels/dot.cu.
const _: () = assert!(size_of::<DotArguments>() == 96);

/// Room for dot products: [`Config::dot`], [`Probe::dot`].
pub struct Dots {
    others: Mirrored<Other>,
    chunks: Buffer,
    records: ReadBack,
}

impl Feature<()> for Dots {
    fn new(core: &mut Core, (): ()) -> Result<Self, Error> {
        let (device, tensors) = (&*core.device, core.plan.tensors().len());
        let others = Mirrored::new(device, tensors)?;
        let chunks = device.allocate((core.plan.chunks() * size_of::<Dot>()).max(1))?;
        // Empty tensors have no chunk whose block would set their records.
        let records = ReadBack::zeroed(device, tensors * size_of::<Dot>())?;
        Ok(Self { others, chunks, records })
    }
}

impl Config {
    /// Declares dot products of two lists of tensors: 48 bytes a chunk of 32 Ki elements and 64 a tensor.
    #[must_use]
    pub fn dot(mut self) -> Self {
        self.features.dot = Some(());
        self
    }
}

impl Probe {
    /// Gives dot products and cosines of two lists of tensors. This is no step.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::dot`].
    pub fn dot(&mut self) -> Result<Room<'_, Dots>, Error> {
        Room::new(&mut self.core, &mut self.rooms.dot, "Config::dot")
    }
}

impl Room<'_, Dots> {
    /// The device address of one [`Dot`] a tensor.
    pub fn address(&self) -> u64 {
        self.memory.records.address()
    }

    /// Launches the dot products of the plan's tensors `a` and the tensors `b`: this step's gradients and the last
    /// one's, or gradients and weights. They have the same lengths and any dtypes, and may be the same memory. The
    /// results are then at [`address`](Self::address), for kernels that read them; does not wait. Uploads 16 bytes a
    /// tensor when `b` has moved since the last call, beside the upload for `a`.
    ///
    /// # Errors
    /// Those of [`Probe::measure`] for either list.
    pub fn launch(&mut self, a: &[&dyn Tensor], b: &[&dyn Tensor]) -> Result<(), Error> {
        let Self { core, memory } = self;
        let place = core.device.place();
        let (a, b) = (core.read(&place, a, Planned::Gradients)?, core.read(&place, b, Planned::Lengths)?);
        core.place(&a, None)?;
        let other = |t: &crate::probe::Located| Other { address: t.address, dtype: t.dtype.code(), reserved: 0 };
        memory.others.set(&*core.device, b.tensors.iter().map(other))?;
        let (others, dots) = (memory.others.address(), memory.records.address());
        let chunk_dots = memory.chunks.address();
        core.launch_chunks(&DotArguments { common: core.step.common, others, chunk_dots, dots })?;
        b.finish()?;
        a.finish()
    }

    /// Gives the dot products of the plan's tensors `a` and the tensors `b`. Waits for them.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch), and [`Error::WaitInCapture`].
    pub fn measure(&mut self, a: &[&dyn Tensor], b: &[&dyn Tensor]) -> Result<DotReport, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        self.launch(a, b)?;
        let records = values(self.memory.records.wait(&*self.core.device)?);
        Ok(DotReport::new(self.core.plan.clone(), records))
    }
}
