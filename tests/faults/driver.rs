//! The functions by which the host driver is told which call is to fail, and asked which there were.

use crate::require::{self, pointless, skipped};
use gradprobe::{
    Error,
    cuda::{self},
    cudarc::driver::sys::{self, CUresult},
};
use std::sync::OnceLock;

/// They have no obligations but for the buffers.
pub struct Driver {
    begin: unsafe extern "C" fn(i64, u32, CUresult),
    count: unsafe extern "C" fn() -> usize,
    pass: unsafe extern "C" fn(),
    pause: unsafe extern "C" fn(bool),
    exempt: unsafe extern "C" fn(bool),
    end: unsafe extern "C" fn(*mut u8, usize) -> usize,
    left: unsafe extern "C" fn(*mut u8, usize) -> usize,
    pools: unsafe extern "C" fn(bool),
}

/// The host driver, if that is the driver.
pub fn driver() -> Option<&'static Driver> {
    static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
    DRIVER.get_or_init(find).as_ref()
}

fn find() -> Option<Driver> {
    if let Err(error) = cuda::stream(0) {
        assert!(matches!(error, Error::DriverNotFound { .. } | Error::DeviceNotFound { .. }), "{error}");
        skipped(require::GPU, &error.to_string());
        return None;
    }
    // SAFETY: the driver is there.
    let library = unsafe { sys::culib() };
    macro_rules! function {
        ($name:literal) => {
            // SAFETY: only the host driver has a function of this name, and it has this type.
            match unsafe { library.get(concat!("gradprobe_host_driver_", $name, "\0").as_bytes()) } {
                Ok(function) => *function,
                Err(_) => {
                    pointless("no other driver than that of the tests fails when it is told to");
                    return None;
                }
            }
        };
    }
    Some(Driver {
        begin: function!("faults_begin"),
        count: function!("faults_count"),
        pass: function!("faults_pass"),
        pause: function!("faults_pause"),
        exempt: function!("faults_exempt"),
        end: function!("faults_end"),
        left: function!("left"),
        pools: function!("pools"),
    })
}

impl Driver {
    /// Counts calls from here on; the one of this number has this fault.
    pub fn begin(&self, fault: Option<(usize, (u32, CUresult))>) {
        let (call, (kind, code)) =
            fault.map_or((-1, (0, CUresult::CUDA_SUCCESS)), |(call, kind)| (i64::try_from(call).unwrap(), kind));
        // SAFETY: no obligations.
        unsafe { (self.begin)(call, kind, code) }
    }

    /// Calls so far.
    pub fn count(&self) -> usize {
        // SAFETY: no obligations.
        unsafe { (self.count)() }
    }

    /// There is memory again.
    pub fn give_memory(&self) {
        // SAFETY: no obligations.
        unsafe { (self.pass)() }
    }

    /// Whether calls of all threads are the test's own.
    pub fn pause(&self, pause: bool) {
        // SAFETY: no obligations.
        unsafe { (self.pause)(pause) }
    }

    /// Whether calls of this thread are the test's own.
    pub fn exempt(&self, exempt: bool) {
        // SAFETY: no obligations.
        unsafe { (self.exempt)(exempt) }
    }

    /// The calls since the beginning.
    pub fn end(&self) -> Vec<String> {
        text(self.end).lines().map(str::to_owned).collect()
    }

    /// All that has not been released.
    pub fn left(&self) -> String {
        text(self.left)
    }

    /// Whether the devices of contexts to come allocate in the order of streams.
    pub fn pools(&self, has_pools: bool) {
        // SAFETY: no obligations.
        unsafe { (self.pools)(has_pools) }
    }
}

fn text(write: unsafe extern "C" fn(*mut u8, usize) -> usize) -> String {
    let mut buffer = vec![0; 1 << 20];
    // SAFETY: the buffer has that size.
    let length = unsafe { write(buffer.as_mut_ptr(), buffer.len()) };
    buffer.truncate(length);
    String::from_utf8(buffer).unwrap()
}
