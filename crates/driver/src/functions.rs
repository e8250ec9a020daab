//! The driver's functions, each with the signature cudarc calls it by, which the compiler checks.
#![allow(non_snake_case, reason = "the driver's names")]

use crate::{
    Outcome, context, die, faults,
    graph::{Capture, EXECUTABLES, GRAPHS, Graph, NODES, Work, exchange_mode, refuse_in_any_capture},
    handles::Registry,
    memory::{self, Kind},
    stream::{EVENTS, Event, Kind as StreamKind, STREAMS, Stream, stream},
    trace,
};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUgraph, CUgraphExec, CUgraphNode,
    CUgraphNodeType, CUhostFn, CUmodule, CUresult, CUstream, CUstream_flags, CUstreamCaptureMode,
    CUstreamCaptureStatus,
};
use gradprobe_ptx::{Kernel, fatbin};
use std::{
    env,
    ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void},
    slice,
    sync::{Arc, Mutex},
};

static MODULES: Registry<Module> = Registry::new("module");
static FUNCTIONS: Registry<Arc<Function>> = Registry::new("function");

/// Kernels in a context.
struct Module {
    context: context::Id,
    kernels: Arc<gradprobe_ptx::Module>,
}

/// A kernel in a context.
pub struct Function {
    context: context::Id,
    /// Its module's handle.
    pub module: usize,
    kernels: Arc<gradprobe_ptx::Module>,
    name: String,
}

impl Function {
    pub fn kernel(&self) -> &Kernel {
        self.kernels.kernel(&self.name).expect("it was found when the function was asked for")
    }
}

/// How many modules there are in these contexts.
pub fn modules(within: impl Fn(context::Id) -> bool) -> usize {
    MODULES.all().iter().filter(|module| within(module.context)).count()
}

/// All modules of a context go, which is lost.
pub fn forget(context: context::Id) {
    MODULES.retain(|module| module.context != context);
}

/// The kernels of an image whose PTX is this, read once for all modules made of it: that takes longer than a script's step.
fn read(image: &[u8], ptx: impl FnOnce() -> String) -> Outcome<Arc<gradprobe_ptx::Module>> {
    static READ: Mutex<Vec<(Vec<u8>, Arc<gradprobe_ptx::Module>)>> = Mutex::new(Vec::new());
    let mut known = READ.lock().unwrap();
    if let Some((_, kernels)) = known.iter().find(|(known, _)| *known == image) {
        return Ok(Arc::clone(kernels));
    }
    let ptx = ptx();
    if !ptx.contains(".version") {
        return Err(CUresult::CUDA_ERROR_INVALID_IMAGE);
    }
    let kernels = gradprobe_ptx::Module::parse(&ptx).map_err(|error| {
        eprintln!("host driver: {error}");
        CUresult::CUDA_ERROR_INVALID_PTX
    })?;
    let kernels = Arc::new(kernels);
    known.push((image.to_vec(), Arc::clone(&kernels)));
    Ok(kernels)
}

/// Multiprocessors of the device, and blocks of either kernel that one holds: few, so that a block has many chunks.
const MULTIPROCESSORS: c_int = 3;
const RESIDENT_BLOCKS: c_int = 4;

/// Writes a result to where the caller wants it.
macro_rules! give {
    ($to:expr, $value:expr) => {{
        let value = $value;
        // SAFETY: a caller passes the address of a variable of this type, as the driver demands.
        unsafe { *$to = value }
    }};
}

/// One function. In brackets, what the trace says about a call beside its name.
macro_rules! entry_point {
    (fn $name:ident($($parameter:ident: $type:ty),*) $([$detail:expr])? $body:block) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($parameter: $type),*) -> CUresult {
            trace::call(stringify!($name), || String::new() $(+ &$detail)?);
            let (begun, fault) = faults::before(stringify!($name));
            let outcome = begun.and_then(|()| -> Outcome { $body });
            fault.unwrap_or_else(|| outcome.map_or_else(|error| error, |()| CUresult::CUDA_SUCCESS))
        }
    };
}

/// Functions whose signatures are compared with cudarc's.
macro_rules! entry_points {
    ($(fn $name:ident($($parameter:ident: $type:ty),* $(,)?) $([$detail:expr])? $body:block)*) => {
        $(
            entry_point! { fn $name($($parameter: $type),*) $([$detail])? $body }
            const _: unsafe fn($($type),*) -> CUresult = sys::$name;
        )*
    };
}

/// What the trace says of a copy to or from the host.
fn bytes_and_place(bytes: usize, host: u64) -> String {
    let place = if memory::is_page_locked(host, bytes) { "page-locked" } else { "pageable" };
    format!("{bytes} bytes {place}")
}

// Device and contexts.
entry_points! {
    fn cuInit(_flags: c_uint) {
        Ok(())
    }

    fn cuGetErrorString(_error: CUresult, text: *mut *const c_char) {
        give!(text, c"an error of the host driver".as_ptr());
        Ok(())
    }

    fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) {
        if ordinal != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_DEVICE);
        }
        give!(device, 0);
        Ok(())
    }

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, _device: CUdevice) {
        give!(value, match attribute {
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => MULTIPROCESSORS,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => 9,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => 0,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED => c_int::from(memory::has_pools()),
            _ => return Err(CUresult::CUDA_ERROR_INVALID_VALUE),
        });
        Ok(())
    }

    fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, _device: CUdevice) {
        give!(context, context::retain_primary());
        Ok(())
    }

    fn cuDevicePrimaryCtxRelease_v2(_device: CUdevice) {
        context::release_primary()
    }

    fn cuCtxDestroy_v2(context: CUcontext) {
        context::destroy(context);
        Ok(())
    }

    fn cuCtxGetCurrent(context: *mut CUcontext) {
        give!(context, context::current_handle());
        Ok(())
    }

    fn cuCtxSetCurrent(context: CUcontext) {
        context::set_current(context);
        Ok(())
    }

    fn cuCtxSynchronize() {
        let context = context::current();
        refuse_in_any_capture()?;
        context::streams(context).iter().try_for_each(|stream| stream.refuse_capture())?;
        context::synchronize(context);
        Ok(())
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        context::current();
        give!(free, memory::free_bytes());
        give!(total, memory::DEVICE_BYTES);
        Ok(())
    }
}

// cudarc has it in some versions of CUDA only.
entry_point! {
    fn cuCtxCreate_v2(context: *mut CUcontext, _flags: c_uint, _device: CUdevice) {
        give!(context, context::create());
        Ok(())
    }
}

// Memory.
entry_points! {
    fn cuMemAllocAsync(address: *mut CUdeviceptr, bytes: usize, handle: CUstream) [format!("{bytes} bytes")] {
        // A real driver makes a node of it. That a graph should allocate is not wanted.
        stream(handle)?.refuse_capture()?;
        give!(address, memory::allocate(Kind::Device, bytes)?);
        Ok(())
    }

    fn cuMemFreeAsync(address: CUdeviceptr, handle: CUstream) {
        let stream = stream(handle)?;
        stream.refuse_capture()?;
        memory::give_up(Kind::Device, address);
        stream.enqueue(move || memory::bury(address));
        Ok(())
    }

    fn cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize) [format!("{bytes} bytes")] {
        refuse_in_any_capture()?;
        give!(address, memory::allocate(Kind::Device, bytes)?);
        Ok(())
    }

    fn cuMemFree_v2(address: CUdeviceptr) {
        let context = context::current();
        refuse_in_any_capture()?;
        memory::give_up(Kind::Device, address);
        // It waits for all that may use the memory.
        context::synchronize(context);
        memory::bury(address);
        Ok(())
    }

    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) [format!("{bytes} bytes")] {
        refuse_in_any_capture()?;
        give!(address, memory::allocate(Kind::PageLocked, bytes)? as *mut c_void);
        Ok(())
    }

    fn cuMemFreeHost(address: *mut c_void) {
        context::current();
        refuse_in_any_capture()?;
        memory::give_up(Kind::PageLocked, address as u64);
        memory::bury(address as u64);
        Ok(())
    }

    fn cuMemsetD8Async(to: CUdeviceptr, value: c_uchar, bytes: usize, handle: CUstream) [format!("{bytes} bytes")] {
        context::current();
        memory::demand(to, bytes);
        stream(handle)?.submit(Work::Set { to, value, bytes })
    }

    fn cuMemcpyHtoDAsync_v2(to: CUdeviceptr, from: *const c_void, bytes: usize, handle: CUstream)
    [bytes_and_place(bytes, from as u64)] {
        context::current();
        memory::demand(to, bytes);
        let stream = stream(handle)?;
        if memory::is_page_locked(from as u64, bytes) {
            return stream.submit(Work::Copy { to, from: from as u64, bytes });
        }
        // Captured, it would read memory of the host at replay that is long gone.
        stream.refuse_capture()?;
        // "If pageable memory must first be staged to pinned memory, the driver may synchronize with the stream": it does. And
        // the copy from the buffer of its own may come after the call has returned: it does.
        stream.wait();
        // SAFETY: the caller's memory, of so many bytes.
        let buffer = unsafe { slice::from_raw_parts(from.cast::<u8>(), bytes) }.to_vec();
        stream.enqueue(move || Work::Copy { to, from: buffer.as_ptr() as u64, bytes }.run());
        Ok(())
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, handle: CUstream)
    [bytes_and_place(bytes, to as u64)] {
        context::current();
        memory::demand(from, bytes);
        let stream = stream(handle)?;
        let copy = Work::Copy { to: to as u64, from, bytes };
        if memory::is_page_locked(to as u64, bytes) {
            return stream.submit(copy);
        }
        // To pageable memory the call returns once the bytes are there.
        stream.refuse_capture()?;
        stream.submit(copy)?;
        stream.wait();
        Ok(())
    }

    fn cuMemcpyDtoDAsync_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize, handle: CUstream)
    [format!("{bytes} bytes")] {
        context::current();
        memory::demand(to, bytes);
        memory::demand(from, bytes);
        stream(handle)?.submit(Work::Copy { to, from, bytes })
    }

    fn cuMemcpyDtoH_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize) [bytes_and_place(bytes, to as u64)] {
        refuse_in_any_capture()?;
        memory::demand(from, bytes);
        // Ordered by the default stream, and by no other.
        let stream = context::legacy_stream();
        stream.submit(Work::Copy { to: to as u64, from, bytes })?;
        stream.wait();
        Ok(())
    }
}

// Streams and events.
entry_points! {
    fn cuStreamCreate(handle: *mut CUstream, flags: c_uint) {
        let kind = match flags {
            0 => StreamKind::Blocking,
            flags if flags == CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint => StreamKind::NonBlocking,
            _ => return Err(CUresult::CUDA_ERROR_INVALID_VALUE),
        };
        give!(handle, STREAMS.insert(Stream::new(context::current(), kind)));
        Ok(())
    }

    fn cuStreamDestroy_v2(handle: CUstream) {
        // "In case the device is still doing work in the stream, the function will return immediately".
        context::stream_ends(&STREAMS.remove(handle));
        Ok(())
    }

    fn cuStreamSynchronize(handle: CUstream) {
        context::current();
        let stream = stream(handle)?;
        stream.refuse_capture()?;
        stream.wait();
        Ok(())
    }

    fn cuStreamWaitEvent(handle: CUstream, event: CUevent, _flags: c_uint) {
        context::current();
        EVENTS.get(event).hold(&*stream(handle)?)
    }

    fn cuLaunchHostFunc(handle: CUstream, function: CUhostFn, argument: *mut c_void) {
        context::current();
        let function = function.ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        stream(handle)?.submit(Work::Host { function, argument: argument as usize })
    }

    fn cuEventCreate(event: *mut CUevent, _flags: c_uint) {
        give!(event, EVENTS.insert(Event::new(context::current())));
        Ok(())
    }

    fn cuEventDestroy_v2(event: CUevent) {
        EVENTS.remove(event);
        Ok(())
    }

    fn cuEventRecord(event: CUevent, handle: CUstream) {
        context::current();
        EVENTS.get(event).record(&*stream(handle)?)
    }

    fn cuEventQuery(event: CUevent) {
        refuse_in_any_capture()?;
        // So that a script makes the same calls however fast the device is; that it has not come is a fault of its own.
        if let Some(time) = faults::time_of_queries() {
            EVENTS.get(event).wait_for(time)?;
        }
        if EVENTS.get(event).is_reached()? { Ok(()) } else { Err(CUresult::CUDA_ERROR_NOT_READY) }
    }

    fn cuEventSynchronize(event: CUevent)
    [if EVENTS.get(event).is_reached() == Ok(true) { "already reached" } else { "waits" }] {
        context::current();
        refuse_in_any_capture()?;
        EVENTS.get(event).wait()
    }
}

// Modules and kernels.
entry_points! {
    fn cuModuleLoadData(module: *mut CUmodule, image: *const c_void) {
        let context = context::current();
        refuse_in_any_capture()?;
        // SAFETY: an image has a header of 16 bytes, PTX more characters.
        let head = unsafe { slice::from_raw_parts(image.cast::<u8>(), 16) };
        let kernels = if fatbin::is_fatbin(head) {
            if env::var_os("GRADPROBE_HOST_DRIVER_NO_BINARY").is_some() {
                return Err(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
            }
            // SAFETY: the header says how many bytes there are.
            let image = unsafe { slice::from_raw_parts(image.cast::<u8>(), fatbin::length(head)) };
            read(image, || fatbin::ptx(image).unwrap_or_else(|error| die(&error)))?
        } else {
            // SAFETY: what is no binary is PTX, a string that ends with 0.
            let text = unsafe { CStr::from_ptr(image.cast()) };
            read(text.to_bytes(), || text.to_string_lossy().into_owned())?
        };
        give!(module, MODULES.insert(Module { context, kernels }));
        Ok(())
    }

    fn cuModuleUnload(module: CUmodule) {
        refuse_in_any_capture()?;
        MODULES.remove(module);
        Ok(())
    }

    fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char) {
        let (handle, module) = (module.addr(), MODULES.get(module));
        // SAFETY: a string that ends with 0.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        module.kernels.kernel(&name).map_err(|_| CUresult::CUDA_ERROR_NOT_FOUND)?;
        let kernels = Arc::clone(&module.kernels);
        give!(function, FUNCTIONS.insert(Arc::new(Function { context: module.context, module: handle, kernels, name })));
        Ok(())
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int,
        function: CUfunction,
        threads: c_int,
        shared_bytes: usize,
        _flags: c_uint,
    ) {
        let fits = |threads| (1..=FUNCTIONS.get(function).kernel().max_threads()).contains(&threads);
        if !u32::try_from(threads).is_ok_and(fits) || shared_bytes != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        give!(blocks, RESIDENT_BLOCKS);
        Ok(())
    }

    fn cuLaunchKernel(
        function: CUfunction,
        blocks: c_uint,
        blocks_y: c_uint,
        blocks_z: c_uint,
        threads: c_uint,
        threads_y: c_uint,
        threads_z: c_uint,
        shared_bytes: c_uint,
        handle: CUstream,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) [format!("{} of {blocks} blocks", FUNCTIONS.get(function).name)] {
        let (context, function, stream) = (context::current(), FUNCTIONS.get(function), stream(handle)?);
        if function.context != context || stream.context != context {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        let fits = (1..=function.kernel().max_threads()).contains(&threads);
        let others = (blocks_y, blocks_z, threads_y, threads_z, shared_bytes);
        if blocks == 0 || !fits || others != (1, 1, 1, 1, 0) || !extra.is_null() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let parameters = function.kernel().parameter_bytes().enumerate().map(|(index, bytes)| {
            // SAFETY: as many addresses as the kernel has parameters.
            let parameter = unsafe { parameters.add(index) };
            // SAFETY: one of them.
            let parameter = unsafe { *parameter }.cast::<u8>();
            // SAFETY: of a parameter of this size.
            unsafe { slice::from_raw_parts(parameter, usize::try_from(bytes).unwrap_or(0)) }.to_vec()
        });
        let parameters = parameters.collect();
        stream.submit(Work::Kernel { function: Arc::clone(&function), blocks, threads, parameters })
    }
}

// Captures and graphs.
entry_points! {
    fn cuStreamBeginCapture_v2(handle: CUstream, mode: CUstreamCaptureMode) {
        context::current();
        if handle.is_null() {
            return Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        let stream = stream(handle)?;
        let mut capture = stream.capture();
        if capture.is_some() {
            return Err(CUresult::CUDA_ERROR_ILLEGAL_STATE);
        }
        *capture = Some(Capture::begin(mode));
        Ok(())
    }

    fn cuThreadExchangeStreamCaptureMode(mode: *mut CUstreamCaptureMode) {
        // SAFETY: the caller's variable, which holds the mode to come.
        let next = unsafe { *mode };
        give!(mode, exchange_mode(next));
        Ok(())
    }

    fn cuStreamIsCapturing(handle: CUstream, status: *mut CUstreamCaptureStatus) {
        context::current();
        give!(status, match &*stream(handle)?.capture() {
            None => CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE,
            Some(capture) if capture.id().is_err() => CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED,
            Some(_) => CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE,
        });
        Ok(())
    }

    fn cuStreamEndCapture(handle: CUstream, graph: *mut CUgraph) {
        context::current();
        give!(graph, std::ptr::null_mut());
        let capture = stream(handle)?.capture().take().ok_or(CUresult::CUDA_ERROR_ILLEGAL_STATE)?;
        give!(graph, GRAPHS.insert(Graph::new(capture.end()?)));
        Ok(())
    }

    fn cuGraphGetNodes(graph: CUgraph, nodes: *mut CUgraphNode, count: *mut usize) {
        let handles = GRAPHS.get(graph).nodes();
        if !nodes.is_null() {
            // SAFETY: where there is room for nodes, the caller says for how many.
            let room = unsafe { *count };
            for (index, &handle) in handles.iter().take(room).enumerate() {
                // SAFETY: within that room.
                let node = unsafe { nodes.add(index) };
                give!(node, handle);
            }
        }
        give!(count, handles.len());
        Ok(())
    }

    fn cuGraphNodeGetType(node: CUgraphNode, kind: *mut CUgraphNodeType) {
        give!(kind, NODES.get(node).node_type());
        Ok(())
    }

    fn cuGraphInstantiateWithFlags(executable: *mut CUgraphExec, graph: CUgraph, _flags: c_ulonglong) {
        give!(executable, EXECUTABLES.insert(GRAPHS.get(graph).work()));
        Ok(())
    }

    fn cuGraphLaunch(executable: CUgraphExec, handle: CUstream) {
        context::current();
        let (stream, executable) = (stream(handle)?, EXECUTABLES.get(executable));
        if !executable.iter().filter_map(|work| work.module()).all(|module| MODULES.find(module).is_some()) {
            die("a graph is launched after the module of one of its kernels was unloaded");
        }
        executable.iter().try_for_each(|work| stream.submit(work.clone()))
    }

    fn cuGraphExecDestroy(executable: CUgraphExec) {
        EXECUTABLES.remove(executable);
        Ok(())
    }

    fn cuGraphDestroy(graph: CUgraph) {
        GRAPHS.remove(graph);
        Ok(())
    }
}
