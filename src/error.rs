//! The one error type. NaN and Inf in gradients are data, never errors.

/// Names every failure. Each message names the tensor, file, option or driver call at fault.
///
/// # After an error
///
/// An error leaves nothing behind: no memory, no lock, no pending wait. `tests/faults` fails every call of the driver
/// and of NCCL in a script over all features, in each way that the table lists, and checks the state afterwards.
///
/// | event | the error | the remedy |
/// |---|---|---|
/// | a wrong argument, or a call out of order | a variant of its own, with the name at fault | Nothing was launched. Correct the call. |
/// | no memory, now or from now on | [`OutOfMemory`](Self::OutOfMemory), with the bytes | [`Probe::new`](crate::Probe::new) holds nothing then. In a step only an upload can need more memory: nothing was launched. Call again when there is memory. |
/// | a call of the driver fails, and the next does not | [`Driver`](Self::Driver), with the function, its code and its purpose | Call again. The next report tells whether the step was measured. The clip or the update after a measurement may not have been launched. |
/// | an error that cudarc kept, of a `drop` or of the note of a slice's use | [`Driver`](Self::Driver), of "an earlier call" | The same. Other streams may not wait for the slice: wait for this one before they write to it. |
/// | an illegal address, a launch that failed, an uncorrectable memory error, a driver at its end | [`Driver`](Self::Driver), on this and every later call of any library | Nothing in this process: such a context cannot be saved. Drop all, which neither waits nor panics, and start again from a checkpoint. |
/// | work or events that come late | none | Nothing is to be done: [`Probe::poll`](crate::Probe::poll) gives the report later. |
/// | a binary of the kernels that is not for the device, and no NVRTC | [`KernelLoad`](Self::KernelLoad) | Install NVRTC, or build with nvcc. |
/// | NCCL refuses a call | [`Communication`](Self::Communication), with its code | The other ranks wait for this one: drop the probe, or abort them. |
/// | NCCL is in progress, as with `NCCL_COMM_BLOCKING=0` | none | Nothing is to be done: it is waited for. |
/// | a rank hangs, is gone, or comes with another count | [`Communication`](Self::Communication), after the deadline at the latest | The communicator is aborted, and the probe of no more use but to be dropped. Come together again, with [`ProbeState`](crate::ProbeState). |
/// | a rank differs, or cannot make its probe | [`RankDiffers`](Self::RankDiffers), on all ranks | No rank has a probe. |
/// | a file of a state is damaged, of another probe or another version | [`Unreadable`](Self::Unreadable), [`StateOfAnotherProbe`](Self::StateOfAnotherProbe) | Nothing was changed. Go on from another file, or restore the old declaration. |
/// | a file cannot be written | [`EntryLost`](Self::EntryLost), beside the training | Training goes on, and so do the writers when there is room again. |
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two tensors of a plan have one name.
    #[error("tensor {name:?} is in the plan twice")]
    DuplicateTensor {
        /// The name both have.
        name: String,
    },
    /// A tensor, or all of them together, has more than the 2^40 elements for which the accuracy is promised.
    #[error("tensor {name:?}: {length} elements bring the plan above the limit of 2^40 elements")]
    TooLarge {
        /// The tensor that passes the limit.
        name: String,
        /// Its elements.
        length: u64,
    },
    /// A configuration value outside its range.
    #[error("{option} must be {expected}, not {value}")]
    InvalidConfig {
        /// The option's name.
        option: &'static str,
        /// The allowed values.
        expected: &'static str,
        /// The given value.
        value: String,
    },
    /// A pattern that selects tensors by name matches none of the plan.
    #[error("no tensor's name matches {pattern:?}")]
    NoSuchTensor {
        /// The pattern.
        pattern: String,
    },
    /// A tensor of more than 2^32 - 1 elements cannot be tracked across steps.
    #[error("tensor {name:?}: {length} elements are more than the 2^32 - 1 that can be tracked")]
    TooLargeToTrack {
        /// The tensor's name.
        name: String,
        /// Its elements.
        length: u64,
    },
    /// The probe was not declared with this feature.
    #[error("this probe was made without it: declare it with `{declare}`")]
    NotDeclared {
        /// The call that declares it.
        declare: &'static str,
    },
    /// A tensor cannot lie on ranks as declared.
    #[error("tensor {name:?} cannot be laid out {what}")]
    Placement {
        /// The tensor's name.
        name: String,
        /// The contradiction.
        what: String,
    },
    /// Ranks cannot work together: one has other settings, or tensors that do not fit those of the others, or could not
    /// make its probe. The same on all ranks, except one with an error of its own.
    #[error("rank {rank}: {what}")]
    RankDiffers {
        /// The rank that differs.
        rank: u32,
        /// The difference.
        what: String,
    },
    /// The NCCL library could not be loaded.
    #[error(
        "no NCCL: none of {searched} could be loaded ({reason}); where there is only a libnccl.so.2, link it to that name"
    )]
    NcclNotFound {
        /// File names looked for in the loader's search path.
        searched: String,
        /// The loader's message for the last of them.
        reason: String,
    },
    /// Ranks cannot reach each other.
    #[error("the ranks cannot communicate: {what}")]
    Communication {
        /// The reason.
        what: String,
    },
    /// A variance needs two steps.
    #[error("signal and noise need at least 2 tracked steps, there were {steps}")]
    TooFewSteps {
        /// Steps so far.
        steps: u32,
    },
    /// A tensor does not fall into units of the length given.
    #[error("tensor {name:?}: {length} elements do not fall into units of {unit}")]
    UnitLength {
        /// The tensor's name.
        name: String,
        /// Its elements.
        length: u64,
        /// Elements of a unit.
        unit: u64,
    },
    /// Adaptive clipping by shapes, for a plan without shapes.
    #[error("a unit's length follows from the shapes, which the plan has none of: add `Plan::with_shapes`")]
    WithoutShapes,
    /// A report is of other tensors than the plan or report beside it.
    #[error("the report is of another plan: tensor {name:?}: {what}")]
    ReportOfAnotherPlan {
        /// The first tensor that differs.
        name: String,
        /// The difference.
        what: String,
    },
    /// A baseline was learned from other tensors.
    #[error("the baseline is of another model: tensor {name:?}: {what}")]
    BaselineOfAnotherModel {
        /// The first tensor that differs.
        name: String,
        /// The difference.
        what: String,
    },
    /// A micro-batch is not the next, or not one of an accumulation.
    #[error(
        "micro-batch {given} (measurement {step}) cannot follow micro-batch {last} (measurement {last_step}) of {of}"
    )]
    MicroBatchOrder {
        /// Its number in the accumulation, from 1.
        given: u32,
        /// The number of its measurement.
        step: u64,
        /// The number of the last one, 0 when an accumulation begins.
        last: u32,
        /// The number of its measurement.
        last_step: u64,
        /// Micro-batches in an accumulation.
        of: u32,
    },
    /// There are more micro-batches without a step than declared.
    #[error("there is room for {of} micro-batches, and no step was measured after the last")]
    TooManyMicroBatches {
        /// The declared number.
        of: u32,
    },
    /// No tensor of a step has a gradient.
    #[error("every tensor is absent: leave the step out, or give `Absent` only where there is no gradient")]
    AllAbsent,
    /// A plan is made of tensors, and one of them is absent.
    #[error("tensor {name:?} is absent: a plan needs its type and length, as `Plan::new` takes them")]
    AbsentInPlan {
        /// The tensor's name.
        name: String,
    },
    /// A list does not have one item a tensor of the plan.
    #[error("the plan has {planned} tensors, {given} were given: {}", first_that_differs(.first.as_deref()))]
    TensorCount {
        /// Tensors in the plan.
        planned: usize,
        /// Items given.
        given: usize,
        /// The first tensor of the plan with another type or length in its place, or none; `None` where all are there,
        /// and more behind them.
        first: Option<String>,
    },
    /// A step's tensor differs from the plan in dtype or length.
    #[error("tensor {name:?}: the plan has {planned}, the step gave {given}")]
    TensorMismatch {
        /// The tensor's name.
        name: String,
        /// Length and dtype in the plan.
        planned: String,
        /// Length and dtype given.
        given: String,
    },
    /// A tensor with elements has the address 0.
    #[error("tensor {name:?}: the address is null; a tensor without a gradient is given as `Absent`")]
    NullPointer {
        /// The tensor's name.
        name: String,
    },
    /// A tensor's address is not a multiple of its element size.
    #[error("tensor {name:?}: address {address:#x} is not a multiple of the {size} bytes of its elements")]
    MisalignedPointer {
        /// The tensor's name.
        name: String,
        /// The address.
        address: u64,
        /// Bytes of an element.
        size: usize,
    },
    /// A tensor's last byte would lie beyond the address space.
    #[error("tensor {name:?}: {length} elements at {address:#x} pass the end of the address space")]
    AddressOverflow {
        /// The tensor's name.
        name: String,
        /// The address.
        address: u64,
        /// Elements.
        length: u64,
    },
    /// Two tensors share memory, and one of them is changed in place, which would change the other.
    #[error("tensors {first:?} and {second:?} overlap in memory: what is changed in place would be changed twice")]
    Overlap {
        /// The one with the lower address.
        first: String,
        /// The other.
        second: String,
    },
    /// A tensor has a gradient, but no weight for the optimizer to move.
    #[error("tensor {name:?} has a gradient and no weight to update")]
    WithoutWeight {
        /// The tensor's name.
        name: String,
    },
    /// A saved state is of another plan, configuration or version than the probe's, or damaged.
    #[error("the state does not fit this probe: {what}")]
    StateOfAnotherProbe {
        /// The difference.
        what: String,
    },
    /// A clip or a wait came before any measurement: there is no coefficient and no report yet.
    #[error("nothing has been measured yet: there is no coefficient to clip by and no report to wait for")]
    NotMeasured,
    /// Gradients would be multiplied twice by one measurement's decision.
    #[error(
        "tensor {name:?} has been clipped since it was measured: measure before another clip, and do not clip before an optimizer's \
         step, which clips"
    )]
    AlreadyClipped {
        /// The first tensor that has.
        name: String,
    },
    /// The CUDA driver library could not be loaded.
    #[error("no CUDA driver: none of {searched} could be loaded ({reason})")]
    DriverNotFound {
        /// File names looked for in the loader's search path.
        searched: String,
        /// The loader's message for the last of them.
        reason: String,
    },
    /// The driver is there, but not the device.
    #[error("no CUDA device {ordinal} ({reason})")]
    DeviceNotFound {
        /// The ordinal asked for.
        ordinal: usize,
        /// The driver's code.
        reason: String,
    },
    /// A tensor lies where the probe's kernels cannot reach it, or in no order with them.
    #[error("tensor {name:?} {what}")]
    WrongDevice {
        /// The tensor's name.
        name: String,
        /// Where it lies.
        what: &'static str,
    },
    /// A call to the CUDA driver failed. An error of an earlier asynchronous call may surface here.
    #[error("CUDA driver: {call} failed with {code} while {doing}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The purpose of the call.
        doing: String,
        /// The driver's code, as its header spells it.
        code: String,
    },
    /// The kernels could be loaded neither from the embedded binary nor through NVRTC.
    #[error("the kernels could not be loaded: {0}")]
    KernelLoad(String),
    /// Addresses changed while the stream was being captured; a graph would keep the old ones.
    #[error("addresses changed during graph capture: call bind() with them before the capture")]
    AddressesChangedInCapture,
    /// A call waits for a report while the stream is being captured. The report exists once the graph has run.
    #[error("wait() was called during graph capture: there is a report only once the graph has run")]
    WaitInCapture,
    /// A call uploads while the stream is being captured. A graph would repeat the upload at every replay, from memory
    /// of the host that is long freed.
    #[error("values were set during graph capture: do so before the capture")]
    UploadInCapture,
    /// A launch would be captured into a graph, and the caller has not vouched for the memory that the graph keeps.
    #[error("the stream is being captured: call bind() before, which says what a graph needs to stay")]
    NotBound,
    /// A file cannot be read, or has other content.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: std::path::PathBuf,
        /// The system's message, or the content found.
        reason: String,
    },
    /// A file or folder cannot be written.
    #[error("{}: {reason}", path.display())]
    Unwritable {
        /// The file or folder.
        path: std::path::PathBuf,
        /// The system's message.
        reason: String,
    },
    /// A step is not after the last one in a file, or in the event files of a folder. No step is written twice.
    #[error(
        "{}: step {step} is not after step {last}, the last one there: a run that begins anew needs a place of its own",
        path.display()
    )]
    StepWritten {
        /// The file.
        path: std::path::PathBuf,
        /// The step to write.
        step: u64,
        /// The last step in the file.
        last: u64,
    },
    /// A sink could not write an entry.
    #[error("step {step} is lost: {error}")]
    EntryLost {
        /// The entry's step.
        step: u64,
        /// The reason, with the file.
        error: Box<Error>,
    },
    /// An item to write is of other tensors than the report beside it.
    #[error("the {entry} is of another plan than the report: tensor {name:?}: {what}")]
    EntryOfAnotherPlan {
        /// The item.
        entry: &'static str,
        /// The first tensor that differs.
        name: String,
        /// The difference.
        what: String,
    },
    /// A histogram is of other gradients than the report beside it: of another step, of a part of the tensors, or of
    /// before or after a clip.
    #[error(
        "the histogram is of other gradients than the report, most likely measured after the clip: measure it before; \
         tensor {name:?}: {what}"
    )]
    HistogramOfOtherGradients {
        /// The first tensor that differs.
        name: String,
        /// The difference.
        what: String,
    },
    /// An item to write is of another step than the report beside it.
    #[error("the {entry} is of step {step}, the report of step {reported}")]
    EntryOfAnotherStep {
        /// The item.
        entry: &'static str,
        /// Its step.
        step: u64,
        /// The report's.
        reported: u64,
    },
    /// A picture could not be drawn.
    #[error("drawing: {reason}")]
    Drawing {
        /// The reason.
        reason: String,
    },
    /// The view needs a terminal, and there is none.
    #[error("no terminal: {reason}")]
    NoTerminal {
        /// The system's message.
        reason: String,
    },
    /// A writing thread could not be started, or one of its sinks panicked.
    #[error("writing in the background: {reason}")]
    Thread {
        /// The reason.
        reason: String,
    },
    /// The host ran out of memory, or the device did.
    #[error("{bytes} bytes of memory could not be allocated")]
    OutOfMemory {
        /// Bytes needed in all.
        bytes: u64,
    },
}

fn first_that_differs(first: Option<&str>) -> String {
    first.map_or("more than the plan's".to_owned(), |name| format!("the first that differs is {name:?}"))
}

impl Error {
    /// Adds the name of the tensor at fault.
    pub(crate) fn named(self, name: &str) -> Self {
        match self {
            Self::WrongDevice { what, .. } => Self::WrongDevice { name: name.to_owned(), what },
            other => other,
        }
    }
}
