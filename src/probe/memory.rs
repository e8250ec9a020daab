//! Memory of a device for the rooms: tables with a mirror on the host, and results that are read back.

use crate::{
    Error,
    device::{Buffer, Device, Read},
};
use bytemuck::Pod;

/// Makes a buffer that holds these bytes.
pub(crate) fn uploaded(device: &dyn Device, bytes: &[u8]) -> Result<Buffer, Error> {
    let buffer = device.allocate(bytes.len().max(1))?;
    device.upload(bytes, &buffer)?;
    Ok(buffer)
}

/// Fails while the stream is being captured.
pub(crate) fn outside_capture(device: &dyn Device, error: Error) -> Result<(), Error> {
    if device.is_capturing()? { Err(error) } else { Ok(()) }
}

/// Splits bytes read from the device into values.
pub(crate) fn values<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// Starts to copy a whole buffer to the host.
pub(crate) fn copied(device: &dyn Device, buffer: &Buffer) -> Result<Box<dyn Read>, Error> {
    let mut read = device.read(buffer.bytes())?;
    read.start(buffer)?;
    Ok(read)
}

/// Reads lists of f32 from a buffer, each by its place and length; an absent list has a length of 0. Waits for them.
pub(crate) fn parts(
    device: &dyn Device,
    buffer: &Buffer,
    places: impl Iterator<Item = (u64, u64)>,
) -> Result<Vec<Vec<f32>>, Error> {
    let read = copied(device, buffer)?;
    let bytes = read.wait()?;
    let at = |element: u64| usize::try_from(element * 4).unwrap_or(usize::MAX);
    let part = |(place, len)| if len == 0 { Vec::new() } else { values(&bytes[at(place)..at(place + len)]) };
    Ok(places.map(part).collect())
}

/// Uploads such lists, each to its place, and 0 between them.
pub(crate) fn set_parts<'a>(
    device: &dyn Device,
    buffer: &Buffer,
    parts: impl Iterator<Item = (u64, &'a [f32])>,
) -> Result<(), Error> {
    let mut all = vec![0f32; buffer.bytes() / 4];
    for (place, part) in parts {
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        all.get_mut(place..).unwrap_or_default()[..part.len()].copy_from_slice(part);
    }
    device.upload(bytemuck::cast_slice(&all), buffer)
}

/// A table in device memory, and its known content.
pub(crate) struct Mirrored<T> {
    buffer: Buffer,
    current: Vec<T>,
}

impl<T: Pod + PartialEq> Mirrored<T> {
    /// Makes a table of this many entries, with unknown content.
    pub fn new(device: &dyn Device, count: usize) -> Result<Self, Error> {
        Ok(Self { buffer: device.allocate((count * size_of::<T>()).max(1))?, current: Vec::with_capacity(count) })
    }

    pub fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// The entries, in the order of the last upload; none before it.
    pub fn current(&self) -> &[T] {
        &self.current
    }

    /// Brings the table up to date, with one upload if its content differs. Says whether there was one.
    ///
    /// # Errors
    /// [`Error::AddressesChangedInCapture`], or the device's.
    pub fn set(
        &mut self,
        device: &dyn Device,
        entries: impl ExactSizeIterator<Item = T> + Clone,
    ) -> Result<bool, Error> {
        if self.current.len() == entries.len() && self.current.iter().copied().eq(entries.clone()) {
            return Ok(false);
        }
        outside_capture(device, Error::AddressesChangedInCapture)?;
        self.current.clear();
        self.current.extend(entries);
        let uploaded = device.upload(bytemuck::cast_slice(&self.current), &self.buffer);
        if uploaded.is_err() {
            self.current.clear();
        }
        uploaded.map(|()| true)
    }
}

/// Results in device memory, and the copy on the host.
pub(crate) struct ReadBack {
    buffer: Buffer,
    read: Box<dyn Read>,
    is_started: bool,
    bytes: usize,
}

impl ReadBack {
    /// Makes a buffer of this many bytes, all 0.
    pub fn zeroed(device: &dyn Device, bytes: usize) -> Result<Self, Error> {
        // CUDA refuses to allocate 0 bytes.
        let buffer = device.allocate(bytes.max(1))?;
        device.clear(&buffer)?;
        Ok(Self { read: device.read(bytes.max(1))?, is_started: false, buffer, bytes })
    }

    /// Makes a buffer with this content.
    pub fn holding(device: &dyn Device, bytes: &[u8]) -> Result<Self, Error> {
        let made = Self::zeroed(device, bytes.len())?;
        device.upload(bytes, &made.buffer)?;
        Ok(made)
    }

    pub fn address(&self) -> u64 {
        self.buffer.address()
    }

    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Begins to copy the results, behind the work launched so far.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn start(&mut self, device: &dyn Device) -> Result<(), Error> {
        outside_capture(device, Error::WaitInCapture)?;
        self.read.start(&self.buffer)?;
        self.is_started = true;
        Ok(())
    }

    /// Waits for the last copy that was begun.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] before the first, and the device's.
    pub fn finish(&self) -> Result<&[u8], Error> {
        if !self.is_started {
            return Err(Error::NotMeasured);
        }
        Ok(&self.read.wait()?[..self.bytes])
    }

    /// Waits for the work launched so far, and for the copy.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn wait(&mut self, device: &dyn Device) -> Result<&[u8], Error> {
        self.start(device)?;
        self.finish()
    }
}
