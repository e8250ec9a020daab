//! The loss scale in a device's memory, where measuring adapts it.

use super::{Device, DeviceProbe, outside_capture};
use crate::{Error, loss_scale::check_scale};

impl<D: Device> DeviceProbe<D> {
    /// Device address of the f32 loss scale of the next step, valid as long as the probe: what the kernel that begins
    /// `backward` multiplies by. A kernel of one's own that runs before the measurement may set it. `None` without
    /// [`Config::loss_scale`](crate::Config::loss_scale).
    pub fn loss_scale_address(&self) -> Option<u64> {
        self.loss_scale.as_ref().map(|(_, buffer)| self.device.address(buffer))
    }

    /// Sets the loss scale of the next step, and of those after it until it adapts: one upload.
    ///
    /// # Errors
    /// [`Error::NoLossScale`] without [`Config::loss_scale`](crate::Config::loss_scale), [`Error::InvalidConfig`] unless
    /// finite and above 0, or the device's.
    pub fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        check_scale(scale)?;
        let (state, buffer) = self.loss_scale.as_mut().ok_or(Error::NoLossScale)?;
        self.device.upload(bytemuck::bytes_of(&state.with_scale(scale)), buffer)
    }
}
