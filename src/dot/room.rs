//! Dot products on a device: their memory, the second list's table, the launch, and the read-out.

use super::{Dot, DotReport, Other};
use crate::{
    Error, Probe, Tensor,
    device::{Buffer, Kernel},
    probe::{Arguments, Core, Mirrored, Planned, ReadBack, Room, outside_capture, values},
};

/// Room for dot products: [`Config::dot`](crate::Config::dot), [`Probe::dot`].
pub struct Dots {
    others: Mirrored<Other>,
    _chunks: Buffer,
    records: ReadBack,
}

impl Dots {
    pub(crate) fn new(core: &mut Core) -> Result<Self, Error> {
        let (device, tensors) = (&*core.device, core.plan.tensors().len());
        let others = Mirrored::new(device, tensors)?;
        let chunks = device.allocate((core.plan.chunks() * size_of::<Dot>()).max(1))?;
        // Empty tensors have no chunk whose block would set their records.
        let records = ReadBack::zeroed(device, tensors * size_of::<Dot>())?;
        core.arguments = Arguments {
            others: others.address(),
            chunk_dots: chunks.address(),
            dots: records.address(),
            ..core.arguments
        };
        Ok(Self { others, _chunks: chunks, records })
    }
}

impl Probe {
    /// Two lists of tensors beside each other: dot products and cosines. A measurement on the side, no step.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::dot`](crate::Config::dot).
    pub fn dot(&mut self) -> Result<Room<'_, Dots>, Error> {
        Room::new(&mut self.core, &mut self.dot, "Config::dot")
    }
}

impl Room<'_, Dots> {
    /// Launches the dot products of the plan's tensors `a` and the tensors `b`, which have the same lengths and any
    /// dtypes, and may be the same memory: this step's gradients and the last one's, or gradients and weights. They are
    /// then at [`Addresses::dots`](crate::Addresses::dots), for those who read them on the device; does not wait. One
    /// upload of 16 bytes a tensor when `b` has moved since the last call, beside that of `a`.
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
        core.launch(Kernel::Dot, core.arguments.chunk_count, &core.arguments)?;
        b.finish()?;
        a.finish()
    }

    /// The dot products of the plan's tensors `a` and the tensors `b`. Waits for them.
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
